"""Rounds: every contestant once in each, so that all are measured on the machine as it then is.

The speed of a shared machine drifts by more than the contestants differ. What two of them took in
the same round can be compared; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from onelaunch.bench.core.record import percentiles

Samples = dict[str, list[float]]
"""What each contestant took, or reached, round by round."""


def in_rounds(
    contestants: Mapping[str, Callable[[], float]], rounds: int, settle: float = 0.0
) -> Samples:
    """One sample of each contestant in every round. The order is reversed from round to round, so
    that nobody always follows the same one. `settle`: seconds of quiet before each sample."""
    names = list(contestants)
    found: Samples = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for name in reversed(names) if number % 2 else names:
                if settle:
                    time.sleep(settle)
                found[name].append(contestants[name]())
    finally:
        if collecting:
            gc.enable()
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    """For what was not sampled in the same rounds."""
    return statistics.median(a) / statistics.median(b)


def fit(calls: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Least squares of time = a + b calls: (a, b), in the unit of the times."""
    slope, intercept = statistics.linear_regression(calls, times)
    return intercept, slope


def digest(values: Sequence[float]) -> dict[str, object]:
    """Median, spread and number, as a note of a row."""
    return {
        "median": float(f"{statistics.median(values):.6g}"),
        "spread": [float(f"{v:.6g}") for v in percentiles(values)],
        "n": len(values),
    }
