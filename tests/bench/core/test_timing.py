"""Interleaved timing: how much is timed, in which order, and on which buffers."""

import pytest
import torch

from onelaunch.bench.core import timing
from onelaunch.bench.core.timing import (
    Replay,
    buffer_sets,
    calls_in_turn,
    graph_calls,
    replays_in_turn,
)

MB = 1 << 20


@pytest.mark.parametrize(
    ("set_bytes", "sets"),
    [(1, 24), (4 * MB, 24), (5 * MB, 20), (49 * MB, 3), (50 * MB, 2), (1000 * MB, 2)],
)
def test_sets_hold_twice_the_cache_within_bounds(set_bytes, sets):
    assert buffer_sets(set_bytes, 50 * MB) == sets


@pytest.mark.parametrize(
    ("estimate", "sets", "calls"),
    [(2.0, 24, 120), (2.0, 7, 126), (10.0, 2, 40), (400.0, 2, 20), (400.0, 24, 24)],
)
def test_a_graph_walks_every_set_equally_often(estimate, sets, calls):
    assert graph_calls(estimate, sets) == calls
    assert calls % sets == 0


def test_contenders_are_interleaved_in_orders_that_differ_and_repeat():
    log = []
    calls = {name: lambda i, name=name: log.append((name, i)) for name in "abc"}
    waits = []
    restored = []
    times = calls_in_turn(calls, 2, 4, 6, lambda: waits.append(len(log)), restored.append)
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys("abc", 6)
    assert all(t > 0 for samples in times.values() for t in samples)
    block = timing.WARM_CALLS + 4
    order = [name for name, _ in log[::block]]
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len({turn[0] for turn in turns}) > 1
    assert turns == ["".join(turn) for turn in timing._orders(list("abc"), 6)]
    assert restored == order
    assert [i for _, i in log[timing.WARM_CALLS : block]] == [0, 1, 0, 1]
    # one wait before the clock starts and one before it stops, none in between
    assert waits[:4] == [3, block, block + 3, 2 * block]


def test_the_garbage_collector_is_off_while_the_clock_runs_and_on_again_after():
    import gc

    seen = []
    calls_in_turn({"a": lambda i: seen.append(gc.isenabled())}, 1, 2, 1, lambda: None, print)
    assert seen == [True] * timing.WARM_CALLS + [False] * 2
    assert gc.isenabled()


class Clock:
    """A device's time, in microseconds, that replays move on."""

    now = 0.0


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


class Graph:
    def __init__(self, us, log, name):
        self.us, self.log, self.name = us, log, name

    def replay(self):
        self.log.append(self.name)
        Clock.now += self.us


def test_replays_are_timed_by_the_second_of_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    log = []
    replays = {
        "a": Replay(Graph(300.0, log, "a"), 100, []),
        "b": Replay(Graph(40.0, log, "b"), 20, []),
    }

    def before(name):
        log.append(f"before {name}")
        Clock.now += 1000

    times = replays_in_turn(replays, 4, before)
    assert times == {"a": [pytest.approx(3.0)] * 4, "b": [pytest.approx(2.0)] * 4}
    blocks = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert sorted(blocks) == [(f"before {n}", n, n) for n in "ab" for _ in range(4)]


def test_a_capture_that_fails_says_its_own_error(monkeypatch):
    class Broken:
        def capture_begin(self, capture_error_mode):
            pass

        def capture_end(self):
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []

    def call(i):
        calls.append(i)
        if len(calls) > timing.WARM_CALLS:
            raise ValueError("no such path")

    with pytest.raises(ValueError, match="no such path"):
        timing.capture(call, 1, 2)


def test_a_cpu_needs_no_wait():
    timing.synchronizer(torch.device("cpu"))()
