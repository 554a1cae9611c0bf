"""How often compile-budget compiles, on the CPU and on a GPU, and the rows of what its child
processes say."""

from __future__ import annotations

import statistics
from typing import Any

from onelaunch.bench.core.record import Row

AGAIN, DISTINCT = 312, 150
QUICK_AGAIN, QUICK_DISTINCT = 20, 10
RESTARTS = 5
WEIGHTS, SHAPES, KERNELS = "new weights", "distinct shapes", "distinct kernels"
"""What is compiled, as the cases' names end."""


def many_row(case: str, told: dict[str, Any]) -> Row:
    """Of what a child says of many compilations, the first tenth of them and the last."""
    seconds, memory = told["seconds"], told["bytes"]
    tenth = max(1, len(seconds) // 10)
    first, last = (statistics.median(part) for part in (seconds[:tenth], seconds[-tenth:]))
    row = Row.of(
        case,
        seconds,
        notes={
            "failures": told["failures"],
            "first_tenth": round(first, 4),
            "last_tenth": round(last, 4),
            "bytes_before": told["bytes_before"],
            "bytes_after": memory[-1],
            "bytes_a_compilation": round(slope(memory[len(memory) // 2 :])),
            "bytes_by_number": memory[:: max(1, len(memory) // 50)],
        },
    )
    return row


def restart_row(told: list[dict[str, Any]]) -> Row:
    """Fresh processes until they have compiled once, less a compilation."""
    row = Row.of("a fresh process", [each["until_first"] - each["second"] for each in told])
    return row


def slope(values: list[int]) -> float:
    """Of the line of least squares."""
    if len(values) < 2:
        return 0.0
    return statistics.linear_regression(range(len(values)), values).slope
