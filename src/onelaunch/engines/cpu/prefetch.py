"""Prefetching of weights: the variants, and the choice among them by measurement.

Which prefetch is right depends on the processor: of float32 weights `once:4096` was the best on an
AMD EPYC and a quarter of the speed on an Intel Xeon (docs/log.md). So the variants are timed on the
model's own packed weights, once for a processor and a shape, and the answer is kept: see
`prefetch_choice`. Every variant computes the same bits.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from onelaunch.engines.cpu.layout import Operation, PrefetchTo, Product, State
from onelaunch.engines.cpu.pack import Memory, PackedWeights, padded
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.tables import Table
from onelaunch.errors import BadInput

MOST_AHEAD = 1 << 20
MEASURED_FROM = 8 << 20
"""Bytes of weights from which it matters: fewer stay in the caches of a core."""
SECONDS = 0.12
"""Of each of two measurements, for one thread and for several."""
SLICE_BYTES = 1 << 20
CLEARLY = 1.03
"""How many times as fast as no prefetch a variant must be: that is slow nowhere, a wrong one is."""
LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Prefetch:
    """The cache that weights are prefetched to, and how many bytes ahead of their reading."""

    to: PrefetchTo
    ahead: int

    def __str__(self) -> str:
        name = self.to.name.lower()
        return name if self.to == PrefetchTo.NONE else f"{name}:{self.ahead}"

    @classmethod
    def parse(cls, text: str) -> Prefetch:
        """The inverse of `str`. Raises BadInput."""
        name, _, ahead = text.partition(":")
        if text == "none":
            return NONE
        known = {to.name.lower(): to for to in PrefetchTo if to != PrefetchTo.NONE}
        digits = ahead.isascii() and ahead.isdecimal() and len(ahead) < 8
        if name in known and digits and 1 <= int(ahead) <= MOST_AHEAD:
            return cls(known[name], int(ahead))
        raise BadInput(
            f"prefetch={text!r}: must be none, l2:BYTES or once:BYTES, "
            f"with 1 to {MOST_AHEAD} bytes ahead"
        )


NONE = Prefetch(PrefetchTo.NONE, 0)
CANDIDATES = (
    NONE,
    Prefetch(PrefetchTo.L2, 4096),
    Prefetch(PrefetchTo.L2, 8192),
    Prefetch(PrefetchTo.ONCE, 4096),
)
"""What is tried. On a Xeon (Emerald Rapids) distances in L2 from 4 to 32 KB were within 2% of each
other; on an EPYC those beyond 6 KB, and all but `once` at 4 KB, were behind by 1 to 10%."""

Sample = Callable[[Prefetch], float]
"""Computes with some of the weights in a variant; the time that it took, for as many bytes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant, how much faster than no prefetch it was, and in how many rounds."""

    prefetch: Prefetch
    gain: float
    rounds: int


def choose(
    samples: Sequence[Sample],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Measured | None:
    """The variant that is clearly the fastest, or NONE; None where there was no time to
    measure. Each of `samples` is called in a thread of its own, all at the same time.

    Half of the time goes to all variants, the other half to the best of them and no prefetch.
    What is compared is the ratio of two samples of the same round, and of the rounds the median: a
    round that the system disturbed decides nothing.
    """
    first = _rounds(samples, CANDIDATES, seconds / 2, clock)
    if len(first) < LEAST_ROUNDS:
        return None
    gains = {each: _gain(first, i) for i, each in enumerate(CANDIDATES)}
    best = max(CANDIDATES, key=lambda each: gains[each])
    if best == NONE:
        return Measured(NONE, 1.0, len(first))
    second = _rounds(samples, (NONE, best), seconds / 2, clock)
    if len(second) < LEAST_ROUNDS:
        return None
    gain = min(_gain(second, 1), gains[best])
    if gain < CLEARLY:
        return Measured(NONE, 1.0, len(second))
    return Measured(best, gain, len(second))


def _gain(rounds: Sequence[Sequence[float]], index: int) -> float:
    """The speedup of a variant over the first of its round, the median of rounds."""
    return statistics.median(times[0] / times[index] for times in rounds)


def _rounds(
    samples: Sequence[Sample],
    variants: Sequence[Prefetch],
    seconds: float,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Times of every variant, round by round, of all threads; only whole rounds."""
    end = clock() + seconds
    rounds: list[list[float]] = []

    def live(sample: Sample) -> None:
        backwards = False
        while True:
            times = {}
            for each in reversed(variants) if backwards else variants:
                times[each] = sample(each)
                if clock() >= end:
                    return
            backwards = not backwards
            rounds.append([times[each] for each in variants])

    others = [threading.Thread(target=live, args=(each,), daemon=True) for each in samples[1:]]
    for thread in others:
        thread.start()
    live(samples[0])
    for thread in others:
        thread.join()
    return rounds


class Slices:
    """A thread's share of the packed weights, taken slice after slice, as a `Sample`.

    The weights are read as one matrix with `columns` columns, in the order in which they lie. Time
    is that of the processor for this thread: what others take of a core does not count.
    """

    def __init__(
        self, program: Program, weights: PackedWeights, columns: int, share: int, shares: int
    ) -> None:
        self._program = program
        rows = 16 * program.tile
        self._bytes = rows * padded(columns) * weights.dtype.itemsize
        self._count = max(1, min(SLICE_BYTES, weights.n_bytes) // self._bytes)
        slices = max(1, weights.n_bytes // (self._bytes * self._count))
        self._first = slices * share // shares
        self._slices = max(1, slices * (share + 1) // shares - self._first)
        self._next = 0
        self._weights = weights.memory
        self._state, self._table = Table(State.LENGTH), Table(Product.LENGTH)
        self._state[State.NARROW] = int(weights.dtype == torch.bfloat16)
        x_bytes = 4 * padded(columns, 64)
        self._vectors = Memory(x_bytes + 4 * rows, large_pages=False)  # x is zero
        self._table[Product.ROWS], self._table[Product.COLUMNS] = rows, columns
        self._table[Product.X] = self._vectors.address
        self._table[Product.OUT] = self._vectors.address + x_bytes

    def __call__(self, prefetch: Prefetch) -> float:
        self._state[State.PREFETCH_TO] = prefetch.to
        self._state[State.PREFETCH_AHEAD] = prefetch.ahead
        at = (self._first + self._next % self._slices) * self._count * self._bytes
        self._next += 1
        self._table[Product.WEIGHTS] = self._weights.address + at
        state, table = self._state.address, self._table.address
        began = time.thread_time_ns()
        self._program.call(Operation.PRODUCT, state, table, self._count)
        return max(1, time.thread_time_ns() - began)
