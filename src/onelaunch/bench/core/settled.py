"""Times that depend on the host: warm, alone, and from its quiet moments.

What launches each operator from Python takes as long as the host does, and a host that others use
too has stretches of seconds in which all of it takes 1.4 to 2 times as long: on one machine
PyTorch's eager forward of stories15m, 256 tokens, had medians of 2,200, 3,100 and 4,100 us in
twenty samples each, and the record of one experiment had 3,777 where another had 1,960. The slow
moments say nothing of PyTorch. So nothing else is run between these samples; they are taken in
windows, with pauses, until the two fastest windows agree and the host had time to change.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onelaunch.bench.core.record import percentiles, rounded
from onelaunch.bench.core.rounds import collector_off
from onelaunch.compilation.child import usable_cores

WARM_UPS = 2  # samples at the beginning of a window that do not count
WINDOW = 8
LEAST_WINDOWS, MOST_WINDOWS = 20, 80
QUICK_WINDOWS = 4
PAUSE_SECONDS = 0.25
WITHIN = 0.03


@dataclass(frozen=True)
class Settled:
    """Samples of the two fastest windows; the medians of all windows, in their order; whether the
    two fastest are at most WITHIN apart; the load of the host before and after."""

    samples: list[float]
    medians: list[float]
    agree: bool
    load: tuple[float | None, float | None]

    def note(self) -> dict[str, Any]:
        """The host's state, as a note of a row."""
        fastest = sorted(self.medians)
        middle = statistics.median(fastest)
        low, high = percentiles(fastest)
        figures = {"slowest": fastest[-1], "median": middle, "p20": low, "p80": high}
        return {
            "fastest": [rounded(value) for value in fastest[:2]],
            "agree": self.agree,
            "windows": len(fastest),
            "of_all_windows": {name: rounded(value) for name, value in figures.items()},
            "load": list(self.load),
            "cpus": usable_cores(),
        }


def settle(
    sample: Callable[[], float],
    least: int = LEAST_WINDOWS,
    most: int = MOST_WINDOWS,
    sleep: Callable[[float], None] = time.sleep,
) -> Settled:
    """Take at least `least` windows of samples, and more until the two fastest agree, `most` at
    most."""
    load = load_average()
    windows: list[list[float]] = []
    while len(windows) < least or (not _agree(windows) and len(windows) < most):
        if windows:
            sleep(PAUSE_SECONDS)
        windows.append(_window(sample))
    first, second, *_ = sorted(windows, key=statistics.median)
    medians = [statistics.median(window) for window in windows]
    return Settled([*first, *second], medians, _agree(windows), (load, load_average()))


def _window(sample: Callable[[], float]) -> list[float]:
    with collector_off():
        for _ in range(WARM_UPS):
            sample()
        return [sample() for _ in range(WINDOW)]


def _agree(windows: list[list[float]]) -> bool:
    first, second, *_ = sorted(map(statistics.median, windows))
    return second - first <= WITHIN * first


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, where the system counts them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
