"""The walk through the tiles, without a device.

Tiles that are best in a chain of one kernel are not best in a forward (docs/log.md), so whole
forwards are timed, with the tiles of one kind of stage changed at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.tuning.space import WRITES_X

NOISE = 0.02

TimeUs = Callable[[Mapping[str, Blocking]], float]
"""Microseconds of a forward with these tiles, inf where it cannot run."""


@dataclass
class Best:
    """The best blockings, the microseconds of a forward with them, and the least time seen with
    each option of a kind."""

    blockings: dict[str, Blocking]
    us: float
    times: dict[tuple[str, Blocking], float] = field(default_factory=dict)


def descend(
    options: Mapping[str, Sequence[Blocking]],
    time_us: TimeUs,
    together: Sequence[str] = WRITES_X,
) -> Best:
    """The fastest blockings that a walk finds which changes one kind at a time, from the first
    option of each on. Where nothing can run, the result is the first options and inf. Kinds
    `together` have the same columns: they are changed to other columns at once, each to its first
    option of these. A difference within the noise counts where a second look confirms it."""
    walk = _Walk(options, time_us)
    tied = [kind for kind in options if kind in together]
    for kind in options:
        if kind not in tied:
            walk.along(kind, options[kind])
    start = walk.best.blockings
    for width in dict.fromkeys(option.columns for kind in tied for option in options[kind]):
        of_width = {kind: [o for o in options[kind] if o.columns == width] for kind in tied}
        if not all(of_width.values()):
            continue
        best = walk.best.blockings, walk.best.us
        elsewhere = start | {kind: of[0] for kind, of in of_width.items()}
        if start != elsewhere:
            walk.restart(elsewhere)
        for kind in tied:
            walk.along(kind, of_width[kind])
        if start != elsewhere:
            walk.return_unless_better(*best)
    return walk.best


class _Walk:
    """Where a descent stands."""

    def __init__(self, options: Mapping[str, Sequence[Blocking]], time_us: TimeUs) -> None:
        self._time_us = time_us
        self.best = Best({kind: of[0] for kind, of in options.items()}, math.inf)
        self.restart(self.best.blockings)

    def along(self, kind: str, options: Sequence[Blocking]) -> None:
        """Change one kind, to each of its options."""
        for option in options:
            if option != self.best.blockings[kind]:
                blockings = self.best.blockings | {kind: option}
                if self._wins(blockings, self._timed(blockings)):
                    self.best.blockings = blockings

    def restart(self, blockings: dict[str, Blocking]) -> None:
        """Stand elsewhere, whatever it takes there."""
        self.best.us = self._timed(blockings)
        self.best.blockings = blockings

    def return_unless_better(self, blockings: dict[str, Blocking], us: float) -> None:
        """Go back to where the walk was before, unless here is better."""
        here = self.best.blockings, self.best.us
        self.best.blockings, self.best.us = blockings, us
        if self._wins(*here):
            self.best.blockings = here[0]

    def _wins(self, blockings: dict[str, Blocking], us: float) -> bool:
        """Whether blockings of a time replace the best; then `best.us` is theirs."""
        if not us < self.best.us:
            return False
        if us > self.best.us * (1 - NOISE):
            again, best_again = self._timed(blockings), self._timed(self.best.blockings)
            if not again < best_again:
                return False
            us = min(us, again)
        self.best.us = us
        return True

    def _timed(self, blockings: Mapping[str, Blocking]) -> float:
        us = self._time_us(blockings)
        for of in blockings.items():
            self.best.times[of] = min(us, self.best.times.get(of, math.inf))
        return us
