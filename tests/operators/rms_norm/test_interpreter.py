"""Runs interpreted.py in a process of its own: once Triton is imported to interpret, it interprets
for the whole process, and every other test's operator would run through it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TESTS = Path(__file__).with_name("interpreted.py")


def test_the_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(TESTS), "-p", "no:warnings"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    print(done.stdout)
