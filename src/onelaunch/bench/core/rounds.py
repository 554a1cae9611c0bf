"""Rounds: every contestant once in each, so that all are measured on the machine as it then is.

The speed of a shared machine drifts by more than the contestants differ. What two of them took in
the same round can be compared; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from onelaunch.bench.core.record import percentiles, rounded

K = TypeVar("K")
Samples = dict[str, list[float]]
"""What each contestant took, or reached, round by round."""


@contextmanager
def collector_off() -> Iterator[None]:
    """Python's garbage collector is off inside the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_rounds(
    contestants: Mapping[K, Callable[[], float]], rounds: int, settle: float = 0.0
) -> dict[K, list[float]]:
    """One sample of each contestant in every round. The order is reversed from round to round, so
    that none always follows the same one. `settle`: seconds of quiet before each sample."""
    names = list(contestants)
    samples: dict[K, list[float]] = {name: [] for name in names}
    with collector_off():
        for number in range(rounds):
            for name in reversed(names) if number % 2 else names:
                if settle:
                    time.sleep(settle)
                samples[name].append(contestants[name]())
    return samples


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> float:
    """The ratio of medians, for times that were not sampled in the same rounds."""
    return statistics.median(a) / statistics.median(b)


def fit(calls: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Least squares of time = a + b calls: (a, b), in the unit of the times."""
    slope, intercept = statistics.linear_regression(calls, times)
    return intercept, slope


def digest(values: Sequence[float]) -> dict[str, Any]:
    """Median, spread and number, as a note of a row."""
    return {
        "median": rounded(statistics.median(values)),
        "spread": [rounded(value) for value in percentiles(values)],
        "n": len(values),
    }
