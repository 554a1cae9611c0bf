"""The record that `make test-gpu` leaves, of a small tests/gpu and a GPU that is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("benchmarks/records/a-gpu/test-gpu.json")

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("i", range(2))
def test_skips(i):
    pytest.skip("needs two GPUs")

def test_fails():
    assert False, "wrong"

@pytest.fixture
def broken():
    raise RuntimeError("no")

def test_has_no_fixture(broken):
    pass
"""
A_GPU = """
import torch
torch.cuda.is_available = lambda: {there}
torch.cuda.get_device_name = lambda device: "A GPU"
"""


@pytest.fixture
def tree(tmp_path):
    """A working tree with two files of tests for a GPU."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_one.py").write_text(TESTS)
    (folder / "test_two.py").write_text("def test_passes():\n    pass\n")
    return tmp_path


def run(tree, *words, there=True):
    """pytest's exit status, what it printed, and the record if it left one."""
    (tree / "a_gpu.py").write_text(A_GPU.format(there=there))
    command = [sys.executable, "-m", "pytest", "-p", "a_gpu", "-p", "tests.gpu.recording", *words]
    path = os.pathsep.join([str(tree), str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "ONELAUNCH_COMMIT": "abc"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    record = json.loads((tree / RECORD).read_text()) if (tree / RECORD).exists() else None
    return done.returncode, done.stdout + done.stderr, record


PROCESSES = [1, pytest.param(2, marks=pytest.mark.skipif(not find_spec("xdist"), reason="xdist"))]


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_whole_run_is_recorded(tree, processes):
    code, told, record = run(tree, "tests/gpu", *(["-n", "2"] if processes == 2 else []))
    assert code == 1, told
    assert f"record: {tree / RECORD}" in told
    assert (record["experiment"], record["unit"], record["device"]) == ("test-gpu", "s", "A GPU")
    assert record["commit"] == "abc"
    assert "torch" in record["versions"]
    whole, one, two = record["rows"]
    counts = {"passed": 2, "skipped": 2, "failed": 1, "errors": 1}
    assert {name: whole[name] for name in counts} == counts
    assert (whole["case"], whole["n"], whole["processes"]) == ("all", 6, processes)
    assert whole["reasons_to_skip"] == {"needs two GPUs": 2}
    assert whole["not_passed"] == [
        "tests/gpu/test_one.py::test_fails", "tests/gpu/test_one.py::test_has_no_fixture",
    ]  # fmt: skip
    assert whole["ours"] > 0
    assert (one["case"], one["n"], one["failed"]) == ("tests/gpu/test_one.py", 5, 1)
    assert (two["case"], two["n"], two["passed"]) == ("tests/gpu/test_two.py", 1, 1)


@pytest.mark.extended
def test_a_whole_run_replaces_the_record(tree):
    run(tree, "tests/gpu")
    (tree / "tests" / "gpu" / "test_one.py").unlink()
    code, told, record = run(tree, "tests/gpu")
    assert code == 0, told
    assert [row["case"] for row in record["rows"]] == ["all", "tests/gpu/test_two.py"]


def test_a_run_without_a_gpu_leaves_no_record(tree):
    code, told, record = run(tree, "tests/gpu", there=False)
    assert code == 1, told
    assert record is None


class Config:
    """What pytest knows of a command line."""

    def __init__(self, root, *args, **option):
        self.rootpath, self.args = root, args
        self.option = type("Option", (), option)
        self.invocation_params = type("Parameters", (), {"dir": root})


@pytest.mark.parametrize(
    ("args", "option", "whole"),
    [
        (["tests/gpu"], {}, True),
        (["tests/gpu/"], {"keyword": "", "markexpr": "", "maxfail": 0}, True),
        (["tests/gpu", "tests/operators"], {}, True),
        (["tests/operators"], {}, False),
        (["tests"], {}, False),
        (["tests/gpu", "tests/bench"], {}, False),
        (["tests/gpu/test_one.py"], {}, False),
        (["tests/gpu", "tests/gpu/test_one.py::test_fails"], {}, False),
        (["tests/gpu"], {"keyword": "fails"}, False),
        (["tests/gpu"], {"markexpr": "not soak"}, False),
        (["tests/gpu"], {"maxfail": 1}, False),
        (["tests/gpu"], {"deselect": ["tests/gpu/test_one.py"]}, False),
        (["tests/gpu"], {"collectonly": True}, False),
    ],
)
def test_only_a_whole_run_is_one(tmp_path, monkeypatch, args, option, whole):
    from tests.gpu.recording import SHARE, is_whole

    monkeypatch.delenv(SHARE, raising=False)
    assert is_whole(Config(tmp_path, *args, **option)) == whole
