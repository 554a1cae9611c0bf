"""How many micro-steps hide the compilation that follows an update, where weights are baked in.

After an update new programs are compiled, while the old ones go on with the micro-steps of the
next update: their gradients are then of weights one update old.

Work and compilation slow each other down: each has two durations, alone and beside the other, and
a slowdown of its own, the second over the first. Every function says which ones it takes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from onelaunch.errors import BadInput

COMPILATIONS = 5
"""The last ones that a median is of: few, as an update has one and a change is to be seen soon."""
STEPS = 31
"""The last ones that a median is of, alone and beside a compilation apart."""
NOISE = 1e-12
"""Relative, far above the rounding of a few products and far below any clock's error."""


def micro_steps_to_hide(compile_seconds: float, step_seconds: float, slowdown: float = 1.0) -> int:
    """K = ceil(slowdown * compile / step), at least 1: micro-steps that last as long as compiling.

    `compile_seconds` is of a compilation alone; beside the work it takes `slowdown` times as long.
    The micro-steps' own slowdown works the other way, as slower ones hide more: it belongs in
    `step_seconds`, of a micro-step beside a compilation. One timed alone gives a K that is enough
    as well, and may be larger than it need be.

    Raises BadInput where a time is not positive and finite, or `slowdown` is less than 1.
    """
    _check_times(compile_seconds, step_seconds, slowdown)
    steps = slowdown * compile_seconds / step_seconds
    if not math.isfinite(steps):
        raise BadInput(
            f"compiling takes {compile_seconds} s and a micro-step {step_seconds} s: "
            "no number of micro-steps is that large"
        )
    # 2.1 / 0.7 is a little more than 3 in floating point
    return max(1, math.ceil(steps * (1 - NOISE)))


def stall_seconds(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """How long an update of `k` micro-steps waits for its compilation.

    Overlapped: max(0, compile - k * step * slowdown), where `compile_seconds` is of a compilation
    beside the work, `step_seconds` of a micro-step alone, and `slowdown` is the micro-steps'. Not
    overlapped: all of `compile_seconds`, which is then of a compilation alone.

    Raises BadInput as `micro_steps_to_hide` does, and where `k` is less than 1.
    """
    working = _working_seconds(k, compile_seconds, step_seconds, slowdown, overlapped)
    return max(0.0, compile_seconds - working) if overlapped else compile_seconds


def throughput(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """Micro-steps a second with `k` of them and one compilation an update.

    Overlapped: k / max(k * step * slowdown, compile). Not overlapped: k / (k * step + compile).
    The arguments, and what is raised, are those of `stall_seconds`. All `k` micro-steps count as
    slowed: where the compilation ends before them, the truth is up to `slowdown` times as fast.
    """
    working = _working_seconds(k, compile_seconds, step_seconds, slowdown, overlapped)
    return k / (max(working, compile_seconds) if overlapped else working + compile_seconds)


class Measured:
    """K by what a run has measured; for one thread.

    Medians of the last times, and of two the shorter: an interruption only makes a time longer,
    so that no single one counts, save where it is the only time so far.
    """

    def __init__(self, given: int) -> None:
        """`given` is K until enough is measured. Raises BadInput where it is less than 1."""
        _check_k(given)
        self._given = given
        self._compilations: deque[float] = deque(maxlen=COMPILATIONS)
        self._alone: deque[float] = deque(maxlen=STEPS)
        self._beside: deque[float] = deque(maxlen=STEPS)

    def compiled(self, seconds: float) -> None:
        """A compilation beside the work took so long.

        One that ran alone, or that the store had, says nothing about the next: leave it out.
        """
        _check_positive("a compilation", seconds)
        self._compilations.append(seconds)

    def stepped(self, seconds: float, compiling: bool) -> None:
        """A micro-step took so long, with a compilation beside it all the time, or none.

        One in which a compilation began or ended is neither: leave it out.
        """
        _check_positive("a micro-step", seconds)
        (self._beside if compiling else self._alone).append(seconds)

    @property
    def compile_seconds(self) -> float | None:
        """A compilation beside the work."""
        return _median(self._compilations)

    @property
    def step_seconds(self) -> float | None:
        """A micro-step alone."""
        return _median(self._alone)

    @property
    def step_seconds_beside(self) -> float | None:
        """A micro-step beside a compilation."""
        return _median(self._beside)

    @property
    def slowdown(self) -> float | None:
        """The micro-steps': beside a compilation over alone, at least 1, as less is noise."""
        alone, beside = self.step_seconds, self.step_seconds_beside
        return None if alone is None or beside is None else max(1.0, beside / alone)

    @property
    def known(self) -> bool:
        """Whether `k` is by measurement."""
        return bool(self._compilations) and bool(self._beside or self._alone)

    @property
    def k(self) -> int:
        """Micro-steps that hide the median compilation, or what was given while none is known.

        Both times are of one beside the other, so neither is multiplied by a slowdown. While no
        micro-step was timed beside a compilation, those alone stand for it and K errs to more.
        """
        compiling = self.compile_seconds
        step = self.step_seconds_beside or self.step_seconds
        if compiling is None or step is None:
            return self._given
        return micro_steps_to_hide(compiling, step)


def _median(times: deque[float]) -> float | None:
    return statistics.median_low(times) if times else None


def _working_seconds(
    k: int, compile_seconds: float, step_seconds: float, slowdown: float, overlapped: bool
) -> float:
    """What the micro-steps of an update take. Raises BadInput."""
    _check_k(k)
    _check_times(compile_seconds, step_seconds, slowdown)
    return k * step_seconds * (slowdown if overlapped else 1.0)


def _check_times(compile_seconds: float, step_seconds: float, slowdown: float) -> None:
    _check_positive("a compilation", compile_seconds)
    _check_positive("a micro-step", step_seconds)
    if not (math.isfinite(slowdown) and slowdown >= 1):
        raise BadInput(
            f"slowdown is {slowdown}; it must be finite and at least 1, which is no slowdown"
        )


def _check_positive(what: str, seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadInput(f"{what} takes {seconds} s; it must be positive and finite")


def _check_k(k: int) -> None:
    if k < 1:
        raise BadInput(f"an update of {k} micro-steps: it must have at least 1")
