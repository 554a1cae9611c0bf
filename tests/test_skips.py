"""The line at a run's end that says what was skipped for want of what."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import missing, summary


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("could not import 'triton': No module named 'triton'", "triton"),
        ("could not import 'transformers.models.llama': No module named ...", "transformers"),
        ("coremltools is not installed", "coremltools"),
        ("Triton is not installed", "triton"),
        ("the hf extra is not installed", "transformers"),
        ("no NVIDIA GPU here; run on one: make test-gpu", "a GPU"),
        ("needs two GPUs", "a GPU"),
        ("no browser: none of chromium, google-chrome is here", "a browser"),
        ("stories260K.bin is not in ../shared/weights", "models beside the checkout"),
        ("tok512.bin is not beside the repository", "models beside the checkout"),
        ("there is a GPU here", "other reasons"),
    ],
)
def test_a_reason_names_what_is_missing(reason, name):
    assert missing(reason) == name


def report(kind, reason):
    rest = {"sections": (), "duration": 0.0} if kind is pytest.TestReport else {"result": []}
    if kind is pytest.TestReport:
        rest |= {"location": ("f", 1, "t"), "keywords": {}, "when": "call"}
    return kind("f", outcome="skipped", longrepr=("f", 1, f"Skipped: {reason}"), **rest)


def test_tests_are_counted_by_what_is_missing():
    triton = "could not import 'triton': No module named 'triton'"
    reports = [
        *[report(pytest.TestReport, triton)] * 3,
        report(pytest.TestReport, "there is a GPU here"),
        report(pytest.TestReport, "no NVIDIA GPU here"),
        *[report(pytest.CollectReport, triton)] * 2,
        report(pytest.CollectReport, "could not import 'coremltools'"),
    ]
    line = "a GPU 1, coremltools 1 file, triton 3 and 2 files, other reasons 1"
    assert summary(reports) == f"skipped for want of: {line}"
    assert summary([]) == ""


@pytest.mark.extended
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_ends_with_the_line(workers, tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_terminal_summary\n")
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_one')\n")
    (tmp_path / "test_part.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_it(n):\n    pytest.importorskip('no_such_one')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), "-c", "/dev/null", "-n", workers, "-q"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert "\nskipped for want of: no_such_one 3 and 1 file\n" in done.stdout, done.stdout
