"""How fast this machine's threads read memory: what limits a model whose every weight is read for
each token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from onelaunch.engines.cpu.layout import Operation
from onelaunch.engines.cpu.program import Program

PASSES = 15
PASS_BYTES = 64 << 20  # a pass over less would be as long as its threads' start
ALIGN = 4096


def shares(n_bytes: int, threads: int) -> list[tuple[int, int]]:
    """(offset, bytes) of each thread's contiguous part, in whole pages; the last has the rest."""
    pages = n_bytes // ALIGN
    cuts = [pages * i // threads * ALIGN for i in range(threads)] + [n_bytes]
    return [(start, end - start) for start, end in pairwise(cuts)]


@contextmanager
def reader(
    program: Program, address: int, n_bytes: int, threads: int
) -> Iterator[Callable[[], float]]:
    """A function that reads the memory once more and returns GB/s, the best of PASSES.

    Each thread reads its own part, through the compiled program's widest loads; all are started
    beforehand and released together. A small memory is read several times in a pass.
    """
    repeats = max(1, -(-PASS_BYTES // n_bytes))
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    times = [(0.0, 0.0)] * threads

    def live(number: int, offset: int, size: int) -> None:
        while True:
            try:
                begin.wait()
                start = time.perf_counter()
                for _ in range(repeats):
                    program.call(Operation.READ, address + offset, 0, size)
                times[number] = start, time.perf_counter()
                end.wait()
            except threading.BrokenBarrierError:
                return

    workers = [
        threading.Thread(target=live, args=(i, *share), name=f"reader {i}", daemon=True)
        for i, share in enumerate(shares(n_bytes, threads))
    ]

    def best() -> float:
        rates = []
        for _ in range(PASSES):
            begin.wait()
            end.wait()
            took = max(stop for _, stop in times) - min(start for start, _ in times)
            rates.append(repeats * n_bytes / took / 1e9)
        return max(rates)

    for worker in workers:
        worker.start()
    try:
        yield best
    finally:
        begin.abort()
        end.abort()
        for worker in workers:
            worker.join()
