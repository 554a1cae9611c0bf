"""Sums up at the end of a run what was skipped for want of what: a package, a GPU, a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import pytest

WANTED = (
    (r"could not import '(\w+)", None),
    (r"\bhf extra\b", "transformers"),
    (r"(\w+) is not installed", None),
    (r"no NVIDIA GPU|needs (two GPUs|60 GiB)", "a GPU"),
    (r"no browser", "a browser"),
    (r"C compiler", "a C compiler"),
    (r"Core ML is not here", "Core ML"),
    (r"beside (the|this)|at hand|\.\./shared", "models beside the checkout"),
)
"""A pattern of a reason, and what was missing: None for the pattern's first group."""


def missing(reason: str) -> str:
    """What a test that gave this reason was skipped for want of."""
    for pattern, name in WANTED:
        if found := re.search(pattern, reason, re.IGNORECASE):
            return name or found.group(1).lower()
    return "other reasons"


def summary(reports: Iterable[pytest.TestReport | pytest.CollectReport]) -> str:
    """One line for all skipped tests; empty where there are none. A file that was skipped whole
    when it was collected counts as a file: its tests are not known."""
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counter = files if isinstance(report, pytest.CollectReport) else tests
        counter[missing(reason.removeprefix("Skipped: "))] += 1
    parts = []
    for name in sorted(tests | files, key=lambda name: (name == "other reasons", name)):
        counts = [f"{tests[name]}"] if tests[name] else []
        if files[name]:
            counts.append(f"{files[name]} {'file' if files[name] == 1 else 'files'}")
        parts.append(f"{name} {' and '.join(counts)}")
    return f"skipped for want of: {', '.join(parts)}" if parts else ""
