"""`onelaunch doctor`: what it says of the compiled programs, and that it can remove them."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

from onelaunch import cli
from onelaunch.compilation import cache
from onelaunch.compilation.cache import Store
from onelaunch.engines import installed


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def doctor(capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.run(["doctor", *argv])
        return code, *capsys.readouterr()

    return run


def in_use(doctor) -> dict:
    code, out, err = doctor("--json")
    assert (code, err) == (0, "")
    return json.loads(out)["cache"]


def line(doctor) -> str:
    code, out, err = doctor()
    assert (code, err) == (0, "")
    (found,) = (line for line in out.splitlines() if line.startswith("cache "))
    return found


def test_an_empty_cache_is_shown_and_not_made(doctor, store):
    assert in_use(doctor) == {
        "folder": str(store.folder),
        "programs": 0,
        "bytes": 0,
        "limit_bytes": cache.LIMIT_BYTES,
        "unusable": None,
    }
    assert f"{store.folder}: 0 compiled programs, 0.0 MB of at most 1.0 GiB" in line(doctor)
    assert not store.folder.exists()


def test_what_is_in_the_cache_is_counted(doctor, store):
    store.put("a", b"x" * 1_200_000)
    assert "1 compiled program, 1.2 MB" in line(doctor)
    store.put("b", b"x" * 2_000_000)
    found = in_use(doctor)
    assert found["programs"] == 2
    assert found["bytes"] == sum(each.bytes for each in store.entries())
    assert "2 compiled programs, 3.2 MB" in line(doctor)


def test_clearing_says_what_went(doctor, store):
    store.put("a", b"x" * 1_000_000)
    store.put("b", b"x" * 2_000_000)
    size = sum(each.bytes for each in store.entries())
    code, out, err = doctor("--clear-cache", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"folder": str(store.folder), "programs": 2, "bytes": size}
    assert store.entries() == []
    store.put("a", b"x" * 1_000_000)
    said = (0, f"{store.folder}: 1 compiled program, 1.0 MB removed\n", "")
    assert doctor("--clear-cache") == said
    said = (0, f"{store.folder}: 0 compiled programs, 0.0 MB removed\n", "")
    assert doctor("--clear-cache") == said


def test_clearing_loads_no_torch(store):
    code = (
        "import sys; from onelaunch.cli import run; "
        "assert run(['doctor', '--clear-cache']) == 0; "
        "assert not {'torch', 'numpy', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


@pytest.mark.skipif(os.name != "posix", reason="modes as POSIX has them")
def test_a_cache_that_is_not_trusted_is_shown_with_the_reason_and_not_touched(doctor, store):
    store.put("a", b"x")
    store.folder.chmod(0o777)
    found = in_use(doctor)
    assert (found["programs"], found["bytes"]) == (0, 0)
    assert "others can write to it" in found["unusable"]
    assert f"not used: {store.folder}: others can write" in line(doctor)
    code, out, err = doctor("--clear-cache")
    assert (code, out) == (1, "")
    assert err.startswith(f"onelaunch: {store.folder}: others can write")
    assert err.count("\n") == 1
    store.folder.chmod(0o700)
    assert store.contains("a")


def test_what_cannot_be_removed_is_said(doctor, store, monkeypatch):
    store.put("a", b"x")
    monkeypatch.setattr(cache, "_remove", lambda path: None)
    code, out, err = doctor("--clear-cache")
    assert (code, out) == (1, "")
    assert "1 programs are still there" in err


def test_the_versions_of_the_compiler_are_shown(doctor, store):
    versions = json.loads(doctor("--json")[1])["versions"]
    for name in ("numba", "llvmlite"):
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            there = None
        assert versions[name] == there


def test_a_cache_below_a_file_is_shown_with_the_reason(doctor, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "file" / "store"))
    assert "ONELAUNCH_CACHE" in in_use(doctor)["unusable"]


def test_it_says_whether_the_cuda_engine_can_run(doctor, store, monkeypatch):
    missing = "there is no CUDA GPU here"
    monkeypatch.setattr(installed, "_cuda", lambda: ([], missing))
    found = json.loads(doctor("--json")[1])["engines"]["cuda"]
    assert found == {"missing": missing, "choices": 0}
    assert re.search(f"^engine cuda +no: {missing}$", doctor()[1], re.M)
    store.put("key", b"{}", {"what": "the choice of a form"})
    monkeypatch.setattr(installed, "_cuda_engine", lambda gpu: {"missing": None, "choices": 1})
    assert re.search("^engine cuda +logits.* 1 ", doctor()[1], re.M)
