"""A pytest plugin that leaves a record of a whole run of these tests on a GPU: what passed, was
skipped and failed, file by file, and the seconds. `make test-gpu` loads it:

    python -m pytest tests/gpu -p tests.gpu.recording

A run of a part (-k, a file, -x), an interrupted one, and one without a GPU leave none.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.interpreting import SHARE

EXPERIMENT = "test-gpu"
# Options with which pytest runs a part of the tests, or none.
OF_A_PART = (
    "keyword", "markexpr", "deselect", "ignore", "ignore_glob", "maxfail", "collectonly", "lf",
    "stepwise",
)  # fmt: skip


def pytest_configure(config):
    # Workers of pytest-xdist report to the process that started them; that one records.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recording(config), "onelaunch-test-gpu-record")


def is_whole(config) -> bool:
    """Whether a run is of all of tests/gpu, with tests/operators or without, and nothing else."""
    tests = config.rootpath / "tests"
    given = {(config.invocation_params.dir / arg).resolve() for arg in config.args}
    if SHARE in os.environ or any(getattr(config.option, name, None) for name in OF_A_PART):
        return False
    return tests / "gpu" in given and given <= {tests / "gpu", tests / "operators"}


class Recording:
    def __init__(self, config):
        self.config = config
        self.started = time.monotonic()
        self.counts = defaultdict(Counter)  # by file, then by outcome
        self.seconds = Counter()
        self.failed = []
        self.skipped = Counter()  # by reason

    def pytest_collectreport(self, report):
        if report.failed:
            self._note(report.nodeid, "errors")

    def pytest_runtest_logreport(self, report):
        self.seconds[_file_of(report.nodeid)] += report.duration
        if report.skipped:
            self._note(report.nodeid, "skipped")
            self.skipped[_reason(report)] += 1
        elif report.failed:
            self._note(report.nodeid, "failed" if report.when == "call" else "errors")
        elif report.when == "call":
            self._note(report.nodeid, "passed")

    def _note(self, nodeid, outcome):
        self.counts[_file_of(nodeid)][outcome] += 1
        if outcome in ("failed", "errors"):
            self.failed.append(nodeid)

    def pytest_terminal_summary(self, terminalreporter, exitstatus, config):
        ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if ended and self.counts and is_whole(config) and (device := _gpu()):
            terminalreporter.write_line(f"record: {self._write(device)}")

    def _write(self, device: str) -> Path:
        from onelaunch.bench.core.record import Row, record_path, write_record

        total = sum(self.counts.values(), Counter())
        workers = getattr(self.config.option, "numprocesses", None) or 1
        rows = [
            Row(
                "all",
                time.monotonic() - self.started,
                n=sum(total.values()),
                notes=_noted(total)
                | {"processes": workers, "not_passed": sorted(self.failed)}
                | {"reasons_to_skip": dict(sorted(self.skipped.items()))},
            )
        ]
        for file, counts in sorted(self.counts.items()):
            seconds, tests = self.seconds[file], sum(counts.values())
            rows.append(Row(file, seconds, n=tests, notes=_noted(counts)))
        folder = self.config.rootpath / "benchmarks" / "records"
        record_path(EXPERIMENT, folder, device).unlink(missing_ok=True)  # a whole run replaces it
        return write_record(EXPERIMENT, "s", rows, folder, device)


def _noted(counts: Counter) -> dict[str, int]:
    return {outcome: counts[outcome] for outcome in ("passed", "skipped", "failed", "errors")}


def _file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _reason(report) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    told = report.longrepr
    return (told[2] if isinstance(told, tuple) else str(told)).removeprefix("Skipped: ")


def _gpu() -> str | None:
    """The name of the GPU that the tests ran on."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
