"""Triton's cache with digests: damaged files, caches without digests, other cache managers."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from onelaunch.operators.triton_cache import DIGEST, verified
from tests.compiling import absent

pytest.importorskip("triton")

import triton
from triton import knobs
from triton import language as tl
from triton.runtime import driver
from triton.runtime.build import compile_module_from_src
from triton.runtime.cache import FileCacheManager

from onelaunch.bench.core.triton_store import counting

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="Triton interprets (TRITON_INTERPRET)"
)
C_COMPILER = any(map(shutil.which, ("gcc", "clang", "cc")))
LIBRARY = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "seven", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_seven(void) {
  PyObject *module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "number", 7);
  return module;
}
"""


@triton.jit
def seven_kernel(target):
    tl.store(target, 7)


def compiled():
    """Compile or load the kernel as a new process does; returns it and whether it was loaded."""
    seven_kernel.device_caches.clear()
    target = torch.zeros(1, dtype=torch.int32)
    with counting() as counts:
        kernel = seven_kernel.warmup(target, grid=(1,))
    assert counts.hits + counts.compilations == 1
    return kernel.asm["cubin"], bool(counts.hits)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "store"))
    yield tmp_path / "store"
    seven_kernel.device_caches.clear()


def files(store):
    return sorted(path for path in store.rglob("*") if path.is_file())


def half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def other_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "half": half,
    "another byte": other_byte,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "no text": lambda path: path.write_bytes(b"\xff\xfe"),
}


def test_intact_files_are_loaded(store):
    with verified:
        code, _ = compiled()
        assert compiled() == (code, True)
    assert compiled() == (code, True)  # by Triton alone, too
    written = files(store)
    digests = [path for path in written if path.suffix == DIGEST]
    assert {Path(str(path) + DIGEST) for path in written if path.suffix != DIGEST} == set(digests)


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_compiled_again(store, damage):
    with verified:
        code, _ = compiled()
        written = {path: path.read_bytes() for path in files(store)}
        for path in written:
            DAMAGES[damage](path)
            assert compiled() == (code, False), path.name
            assert compiled() == (code, True), path.name
        assert files(store) == list(written)
        for path, content in written.items():
            if path.suffix == ".cubin":
                assert path.read_bytes() == content


def test_without_it_triton_reads_what_is_damaged(store):
    """The reason for the digests."""
    code, _ = compiled()
    (path,) = (path for path in files(store) if path.suffix == ".cubin")
    half(path)
    assert compiled() == (code[: len(code) // 2], True)


def test_a_store_without_digests_is_compiled_anew_once(store):
    code, read = compiled()
    assert not read
    with verified:
        assert compiled() == (code, False)
        assert compiled() == (code, True)


def test_overriding_kernels_need_no_digest(store, tmp_path, monkeypatch):
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dump_dir, knobs.cache.override_dir = (str(tmp_path / n) for n in "do")
        knobs.compilation.dump_ir = True
        with verified:
            compiled()
        dumped = files(tmp_path / "d")
        assert dumped
        assert not any(path.suffix == DIGEST for path in dumped)
        knobs.compilation.dump_ir = False
        (ptx,) = (path for path in dumped if path.suffix == ".ptx")
        assert "7" in ptx.read_text()
        put = tmp_path / "o" / ptx.parent.name / ptx.name
        put.parent.mkdir(parents=True)
        put.write_text(ptx.read_text() + "\n// by a user\n")
        knobs.compilation.override = knobs.compilation.always_compile = True
        seven_kernel.device_caches.clear()
        with verified:
            kernel = seven_kernel.warmup(torch.zeros(1, dtype=torch.int32), grid=(1,))
    assert "by a user" in kernel.asm["ptx"]


@pytest.mark.skipif(not C_COMPILER, reason="needs a C compiler")
@pytest.mark.parametrize("damage", ["half", "another byte", "empty"])
def test_libraries_too(store, damage):
    with verified:
        assert compile_module_from_src(LIBRARY, "seven").number == 7
        (path,) = (path for path in files(store) if path.suffix == ".so")
        content = path.read_bytes()
        path.unlink()  # this process has mapped it
        path.write_bytes(content)
        DAMAGES[damage](path)
        assert compile_module_from_src(LIBRARY, "seven").number == 7
        assert path.read_bytes() == content


def test_threads_share_the_context_and_the_last_one_ends_it():
    assert knobs.cache.manager_class is None
    inside, leave = threading.Barrier(2), threading.Event()

    def stay():
        with verified:
            inside.wait(10)
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with verified:
        thread.start()
        inside.wait(10)
        ours = knobs.cache.manager_class
        assert issubclass(ours, FileCacheManager)
    assert knobs.cache.manager_class is ours
    leave.set()
    thread.join()
    assert knobs.cache.manager_class is None
    assert "manager_class" not in vars(knobs.cache)  # so the environment variable counts again


def test_an_exception_leaves_the_context():
    with pytest.raises(ValueError, match="of the block"), verified:
        raise ValueError("of the block")
    assert knobs.cache.manager_class is None


def test_a_chosen_cache_manager_stays(monkeypatch):
    class Other(FileCacheManager):
        pass

    with knobs.cache.scope():
        knobs.cache.manager_class = Other
        with verified:
            assert knobs.cache.manager_class is Other
        assert knobs.cache.manager_class is Other
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "triton.runtime.cache:RemoteCacheManager")
    with verified:
        assert knobs.cache.manager_class.__name__ == "RemoteCacheManager"
