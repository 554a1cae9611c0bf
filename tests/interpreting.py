"""Tests through Triton's interpreter, in a process of their own: once Triton is imported to
interpret, it interprets for the whole process, and every other test's kernels would run so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
NOTHING_TO_RUN = 5  # what pytest returns of it
SHARE = "ONELAUNCH_TESTS_SHARE"
"""Which part of the tests a process is to run, and of how many parts."""


def run_interpreted(tests: Path) -> None:
    """Run a file of tests, in as many processes as CI has cores; fail with what they printed. Skips
    where there is no Triton."""
    pytest.importorskip("triton")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", str(tests), "-p", "no:warnings"],
            cwd=ROOT,
            env=os.environ
            | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", SHARE: f"{part} {PROCESSES}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    told = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, told, strict=True):
        assert process.returncode in (0, NOTHING_TO_RUN), text
        print(text)
    assert any(process.returncode == 0 for process in processes)


def mend_loop_bounds() -> None:
    """Triton 3.6 reads loop bounds as int(array of one number), which NumPy 2.4 refuses
    (triton-lang/triton#9171; mended in 3.7)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
