"""How many micro-steps hide the compilation after each update, if weights are baked in.

After an update new programs are compiled while the old ones run the micro-steps of the next update:
their gradients are then of weights one update old.

Micro-steps and compilation slow each other down: each has two durations, alone and concurrent with
the other, whose ratio is its slowdown. Every function documents which it takes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from onelaunch.errors import BadInput

COMPILATIONS = 5
"""Window of the median: short, as an update has one and a change must show soon."""
STEPS = 31
"""Window of the medians of micro-steps, alone and during a compilation separately."""
NOISE = 1e-12
"""Relative, far above the rounding of a few products and far below any clock's error."""


def micro_steps_to_hide(compile_seconds: float, step_seconds: float, slowdown: float = 1.0) -> int:
    """Return K = ceil(slowdown * compile / step), at least 1: micro-steps that hide a compilation.

    `compile_seconds` is of a compilation alone; concurrent with micro-steps it takes `slowdown`
    times as long. `step_seconds` is of a micro-step during a compilation, as slower ones hide more;
    that of a micro-step alone also gives a sufficient K, which may be larger than needed.

    Raises BadInput if a time is not positive and finite, or `slowdown` is less than 1.
    """
    _check_times(compile_seconds, step_seconds, slowdown)
    steps = slowdown * compile_seconds / step_seconds
    if not math.isfinite(steps):
        raise BadInput(
            f"compile_seconds={compile_seconds}, step_seconds={step_seconds}: "
            "the number of micro-steps overflows"
        )
    # 2.1 / 0.7 is slightly more than 3 in floating point
    return max(1, math.ceil(steps * (1 - NOISE)))


def stall_seconds(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """Return how long an update of `k` micro-steps waits for its compilation.

    Overlapped: max(0, compile - k * step * slowdown), where `compile_seconds` is of a compilation
    concurrent with micro-steps, `step_seconds` of a micro-step alone, and `slowdown` that of the
    micro-steps. Not overlapped: `compile_seconds`, of a compilation alone.

    Raises BadInput as `micro_steps_to_hide`, and if `k` is less than 1.
    """
    working = _working_seconds(k, compile_seconds, step_seconds, slowdown, overlapped)
    return max(0.0, compile_seconds - working) if overlapped else compile_seconds


def throughput(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """Return micro-steps per second, with `k` micro-steps and one compilation per update.

    Overlapped: k / max(k * step * slowdown, compile). Not overlapped: k / (k * step + compile).
    Arguments and errors are those of `stall_seconds`. All `k` micro-steps count as slowed down: if
    the compilation ends before them, the true rate is up to `slowdown` times as high.
    """
    working = _working_seconds(k, compile_seconds, step_seconds, slowdown, overlapped)
    return k / (max(working, compile_seconds) if overlapped else working + compile_seconds)


class MicroStepEstimator:
    """Estimates K from the times of a run; not thread-safe.

    It uses low medians of the last times: an interruption only makes a time longer, so a single one
    has no effect, unless it is the only time so far.
    """

    def __init__(self, initial_k: int) -> None:
        """`initial_k` is K until enough is measured. Raises BadInput if it is less than 1."""
        _check_k(initial_k)
        self._initial_k = initial_k
        self._compilations: deque[float] = deque(maxlen=COMPILATIONS)
        self._alone: deque[float] = deque(maxlen=STEPS)
        self._during: deque[float] = deque(maxlen=STEPS)

    def add_compilation(self, seconds: float) -> None:
        """Add the time of a compilation that was concurrent with micro-steps.

        Leave out compilations that ran alone and programs from the cache: they do not predict the
        next time.
        """
        _check_positive("compilation seconds", seconds)
        self._compilations.append(seconds)

    def add_micro_step(self, seconds: float, compiling: bool) -> None:
        """Add the time of a micro-step, with a compilation running all the time, or none.

        Leave out micro-steps during which a compilation began or ended.
        """
        _check_positive("micro-step seconds", seconds)
        (self._during if compiling else self._alone).append(seconds)

    @property
    def compile_seconds(self) -> float | None:
        """Median time of a compilation concurrent with micro-steps."""
        return _median(self._compilations)

    @property
    def step_seconds(self) -> float | None:
        """Median time of a micro-step alone."""
        return _median(self._alone)

    @property
    def step_seconds_compiling(self) -> float | None:
        """Median time of a micro-step during a compilation."""
        return _median(self._during)

    @property
    def slowdown(self) -> float | None:
        """Time of a micro-step during a compilation over alone; at least 1, as less is noise."""
        alone, during = self.step_seconds, self.step_seconds_compiling
        return None if alone is None or during is None else max(1.0, during / alone)

    @property
    def is_measured(self) -> bool:
        """Whether `k` is a measurement."""
        return bool(self._compilations) and bool(self._during or self._alone)

    @property
    def k(self) -> int:
        """Micro-steps that hide the median compilation; `initial_k` until it is measured.

        Both times are concurrent ones, so neither is multiplied by a slowdown. Until a micro-step
        is timed during a compilation, those alone are used, and K may be too large.
        """
        compiling = self.compile_seconds
        step = self.step_seconds_compiling or self.step_seconds
        if compiling is None or step is None:
            return self._initial_k
        return micro_steps_to_hide(compiling, step)


def _median(times: deque[float]) -> float | None:
    return statistics.median_low(times) if times else None


def _working_seconds(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """Return the time of all micro-steps of an update. Raises BadInput."""
    _check_k(k)
    _check_times(compile_seconds, step_seconds, slowdown)
    return k * step_seconds * (slowdown if overlapped else 1.0)


def _check_times(compile_seconds: float, step_seconds: float, slowdown: float) -> None:
    _check_positive("compile_seconds", compile_seconds)
    _check_positive("step_seconds", step_seconds)
    if not (math.isfinite(slowdown) and slowdown >= 1):
        raise BadInput(f"slowdown {slowdown}: must be finite and at least 1 (no slowdown)")


def _check_positive(name: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadInput(f"{name} {seconds}: must be positive and finite")


def _check_k(k: int) -> None:
    if k < 1:
        raise BadInput(f"{k} micro-steps per update: must be at least 1")
