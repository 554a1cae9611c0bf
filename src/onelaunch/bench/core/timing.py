"""Times of several contenders, interleaved: kernels only, and the host's part with them.

Kernels only: a CUDA graph of many calls over rotating buffers, replayed between two events. The
buffers hold more than the L2 does wherever the cap on their number allows it, so that a call finds
its input in memory, as a training step does. Host-inclusive: calls back to back and one wait for
the device at the end; a wait or a cleared cache before each call would hide the host's time.

Contenders are interleaved in one process, in another order each time, so that neither a drift of
the clocks nor what a neighbour leaves behind favours one. All times are microseconds a call.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from onelaunch.bench.core.rounds import collector_off

Call = Callable[[int], Any]
"""One call's work on the i-th set of buffers; returns what it made."""

MAX_SETS = 24
MIN_CALLS, MAX_CALLS = 20, 120
GRAPH_US = 400.0  # a graph so long makes its own start, a microsecond or two, vanish
WARM_CALLS = 3
COPY_BYTES = 1 << 30
ORDER_SEED = 0


def buffer_sets(bytes_per_set: int, l2_bytes: int) -> int:
    """The number of sets of buffers that a graph walks: twice the L2's size, within 2 to
    MAX_SETS."""
    return max(2, min(MAX_SETS, math.ceil(2 * l2_bytes / bytes_per_set)))


def graph_calls(estimate_us: float, sets: int) -> int:
    """The number of calls that a graph holds: about GRAPH_US long, and every set as often as any
    other."""
    calls = max(MIN_CALLS, min(MAX_CALLS, math.ceil(GRAPH_US / estimate_us)))
    return math.ceil(calls / sets) * sets


@dataclass
class Replay:
    """A captured graph. `kept` holds the newest outputs of each set of buffers: outputs thereby
    rotate as inputs do."""

    graph: torch.cuda.CUDAGraph
    calls: int
    kept: list[Any]


def capture(call: Call, sets: int, calls: int) -> Replay:
    """A graph of `calls` calls over `sets` sets, captured on the current stream, which must not be
    the default one."""
    for i in range(WARM_CALLS):
        call(i % sets)
    torch.cuda.synchronize()
    kept: list[Any] = [None] * sets
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it empties the allocator's cache before every capture. Backward passes
    # run in a thread of their own: "thread_local" lets that thread do what a capture forbids.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for i in range(calls):
            kept[i % sets] = call(i % sets)
    except BaseException:
        # ending a capture that failed raises too: what failed says more
        with suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()
    return Replay(graph, calls, kept)


def replays_in_turn(
    replays: Mapping[str, Replay], samples: int, before: Callable[[str], None]
) -> dict[str, list[float]]:
    """Samples of every graph, interleaved. Each is `before(name)`, one replay untimed, so that the
    caches are as the graph itself leaves them, and one between events."""
    names = list(replays)
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in _orders(names, samples):
        marks = {}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before(name)
            replays[name].graph.replay()
            start.record()
            replays[name].graph.replay()
            end.record()
            marks[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            times[name].append(start.elapsed_time(end) * 1e3 / replays[name].calls)
    return times


def calls_in_turn(
    calls: Mapping[str, Call],
    sets: int,
    repeats: int,
    samples: int,
    synchronize: Callable[[], None],
    before: Callable[[str], None],
) -> dict[str, list[float]]:
    """Samples of `repeats` calls back to back and one wait for the device, interleaved."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for order in _orders(names, samples):
        for name in order:
            before(name)
            times[name].append(_back_to_back(calls[name], sets, repeats, synchronize))
    return times


def _back_to_back(call: Call, sets: int, repeats: int, synchronize: Callable[[], None]) -> float:
    for i in range(WARM_CALLS):
        call(i % sets)
    synchronize()
    with collector_off():
        start = time.perf_counter()
        for i in range(repeats):
            call(i % sets)
        synchronize()
        return (time.perf_counter() - start) * 1e6 / repeats


def copy_bandwidth(device: torch.device, samples: int = 15) -> float:
    """GB/s, read and written bytes together, of a copy on the device: what a kernel that moves
    memory and does little else can hope for."""
    source = torch.randint(0, 127, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        target.copy_(source)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * COPY_BYTES / statistics.median(times) / 1e9


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits for a device; for a CPU, one that does nothing."""
    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device)
    return lambda: module.synchronize()


def milliseconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """The milliseconds of one call, with the device synchronized before and after."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


def _orders(names: list[str], samples: int) -> Iterator[list[str]]:
    """An order of the names for each sample; the same ones in every run."""
    shuffle = random.Random(ORDER_SEED).shuffle
    for _ in range(samples):
        order = list(names)
        shuffle(order)
        yield order
