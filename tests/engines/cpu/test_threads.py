"""Threads: how many are chosen, the time that one may take, and what they must not outlive."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import weakref

import pytest
import torch

from onelaunch.engines.cpu.layout import Governor, Operation, State, Sync
from onelaunch.engines.cpu.runtime import Table
from onelaunch.engines.engine import Sampling
from onelaunch.errors import EngineTimeout
from onelaunch.generation.decode import generate_ids
from tests.engines.cpu.making import logits_of, make_engine, make_runtime
from tests.engines.suite import SMALL, weights_of

# ---- the choice, with made-up times: the compiled functions' Python twins on real tables


class Governed:
    """Drives the choice as the generation loop does."""

    def __init__(self, module, most: int, seed: int = 0) -> None:
        self.module, self.noise = module, random.Random(seed)
        self.state, self.sync = Table(State.LENGTH), Table(Sync.TICKETS)
        self.governor = Table(Governor.LENGTH)
        self.state[State.THREADS] = most
        self.state[State.SYNC] = self.sync.address
        self.state[State.GOVERNOR] = self.governor.address
        module.reset_governor(self.state.address)

    def run(self, forwards: int, times: dict[int, float], noise: float = 0.0) -> list[int]:
        """The number of threads of each forward, whose time is that number's."""
        used = []
        for _ in range(forwards):
            self.module._use(
                self.state.address, self.governor.address, self.governor[Governor.INDEX]
            )
            threads = self.sync[Sync.ACTIVE]
            took = times[threads] * (1 + noise * self.noise.uniform(-1, 1))
            self.module.govern(self.state.address, took)
            used.append(threads)
        return used


@pytest.fixture
def module(monkeypatch):
    from onelaunch.engines.cpu.native import generate

    def at(kind, address):
        return kind.from_address(address)

    def get_f64(address):
        return at(ctypes.c_double, address).value

    def put_f64(address, value):
        at(ctypes.c_double, address).value = value

    def put_i64(address, value):
        at(ctypes.c_int64, address).value = value

    memory = {
        "field": lambda table, index: at(ctypes.c_int64, table + 8 * index).value,
        "get_f64": get_f64,
        "put_f64": put_f64,
        "put_i64": put_i64,
        "atomic_put": put_i64,
    }
    for name, function in memory.items():
        monkeypatch.setattr(generate, name, function)
    for name, function in list(vars(generate).items()):
        if hasattr(function, "py_func") and function.__module__ == generate.__name__:
            monkeypatch.setattr(generate, name, function.py_func)
    return generate


def times(best: int, most: int = 8) -> dict[int, float]:
    """A valley around the best number."""
    numbers = [1, 2, 4, 8][: most.bit_length()]
    here = numbers.index(best)
    return {n: 1e6 * (1 + 0.3 * abs(i - here)) for i, n in enumerate(numbers)}


@pytest.mark.parametrize("best", [1, 2, 4, 8])
def test_it_settles_on_the_fastest(module, best):
    governed = Governed(module, 8)
    searched = 4 * module.SEARCH_SAMPLES
    first = governed.run(searched + 1, times(best))
    assert set(first[:searched]) == {1, 2, 4, 8}
    assert first[-1] == best
    used = governed.run(5000, times(best))
    assert used.count(best) > 0.95 * len(used)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (6, {1, 2, 4, 6})]
)
def test_it_tries_powers_of_two_and_all(module, most, expected):
    governed = Governed(module, most)
    assert set(governed.run(100, dict.fromkeys(range(1, 9), 1e6))) == expected


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (4, 2), (2, 8), (8, 4)])
def test_it_moves_when_the_fastest_becomes_slow_and_comes_back(module, before, after):
    governed = Governed(module, 8)
    governed.run(3000, times(before))
    changed = {n: t * (1 if after != before else 2) for n, t in times(after).items()}
    changed = {n: 2 * t for n, t in changed.items()}  # all is slower: a longer text
    governed.run(4000, changed)
    used = governed.run(1000, changed)
    assert used.count(after) > 0.9 * len(used)
    governed.run(4000, times(before))
    used = governed.run(1000, times(before))
    assert used.count(before) > 0.9 * len(used)


def test_a_fastest_that_becomes_slow_is_left_soon(module):
    governed = Governed(module, 8)
    governed.run(3000, times(8))
    busy = times(8) | {8: 1e7}  # another process took the cores
    used = governed.run(200, busy)
    assert used.count(8) < 40
    assert used[100:].count(4) > 70


@pytest.mark.parametrize("best", [1, 2, 4, 8])
def test_one_interrupted_forward_decides_no_search(module, best):
    """Whichever forward of whichever number of threads it is."""
    searched = 4 * module.SEARCH_SAMPLES
    for interrupted in range(searched):
        governed = Governed(module, 8)
        governed.run(interrupted, times(best))
        governed.run(1, {n: 5e6 for n in (1, 2, 4, 8)})
        governed.run(searched - interrupted - 1, times(best))
        assert governed.run(1, times(best)) == [best]


@pytest.mark.parametrize(("faster", "moves"), [(0.99, False), (0.97, True)])
def test_it_moves_for_a_gain_that_is_worth_it(module, faster, moves):
    governed = Governed(module, 2)
    governed.run(100, {1: 2e6, 2: 1e6})
    assert governed.run(1, {1: 2e6, 2: 1e6}) == [2]
    used = governed.run(3000, {1: faster * 1e6, 2: 1e6})
    assert (used[-1] == 1) is moves


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_three_percent_does_not_move_it(module, seed):
    governed = Governed(module, 8, seed)
    governed.run(4 * module.SEARCH_SAMPLES + 1, times(4), noise=0.03)
    used = governed.run(10_000, times(4), noise=0.03)
    assert used.count(4) > 0.97 * len(used)


def test_the_engine_may_choose_while_it_runs(compiled_program):
    """Whatever it chooses, the text is the same."""
    config = SMALL.with_(max_seq_len=600)
    engine = make_engine(config, weights_of(config))
    alone = make_engine(config, weights_of(config), threads=1)
    for _ in range(3):
        assert generate_ids(engine, [[1], [2]], 500, Sampling()) == generate_ids(
            alone, [[1], [2]], 500, Sampling()
        )
        tokens = torch.zeros(1, 9, dtype=torch.int64)
        assert torch.equal(engine.logits(tokens), alone.logits(tokens))
    assert engine.describe()["threads_chosen"] == "automatically"
    assert alone.describe()["threads"] == 1
    assert alone.describe()["threads_chosen"] == "by hand"


# ---- what threads share


def test_one_thread_and_several_take_turns_without_mistaking_a_norm_for_another(compiled_program):
    """Each thread remembers the stage whose norm it made by a number; those of one thread and of
    several must never meet, however many forwards lie between them."""
    runtime = make_runtime(compiled_program, SMALL, weights_of(SMALL), threads=2)
    expected = logits_of(runtime, [7])
    stages = runtime.n_stages - 1
    for _ in range(20):  # in some, one thread leaves the other nothing to do
        runtime._sync[Sync.ACTIVE] = 1
        # the last of these stages gets the number of the next call's first with a norm
        runtime.state[State.STAMP] = ((runtime._sync[Sync.EPOCH] + 1) << 12) + 1 - stages
        logits_of(runtime, [33])
        runtime._sync[Sync.ACTIVE] = 2
        assert torch.equal(logits_of(runtime, [7]), expected)


def test_what_threads_read_outlives_them(compiled_program):
    """A runtime that goes while its helpers are at work leaves them their tables."""
    inside: set[int] = set()

    class Watched:
        def __init__(self, program):
            self.program, self.lanes, self.tile = program, program.lanes, program.tile

        def call(self, operation, *arguments):
            if operation != Operation.HELP:
                return self.program.call(operation, *arguments)
            inside.add(threading.get_ident())
            try:
                return self.program.call(operation, *arguments)
            finally:
                inside.discard(threading.get_ident())

    def freed_too_early() -> bool:
        runtime = make_runtime(compiled_program, SMALL, weights_of(SMALL), threads=3)
        tables = [weakref.ref(t) for t in (runtime.state, runtime._sync, runtime._stages)]
        runtime.program = runtime.helpers._program = Watched(runtime.program)
        for _ in range(100):
            logits_of(runtime, [1, 2, 3])
            if inside:
                break
        runtime.helpers.wake()
        del runtime
        gc.collect()
        gone = any(table() is None for table in tables)
        return gone and bool(inside)

    assert not any(freed_too_early() for _ in range(5))


def test_engines_that_come_and_go_leave_no_threads(compiled_program):
    for _ in range(10):
        engine = make_engine(SMALL, weights_of(SMALL), threads=3)
        generate_ids(engine, [[1]], 3, Sampling())
        del engine
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("onelaunch "):
            thread.join(10)
            assert not thread.is_alive()


def test_a_thread_that_does_not_finish_is_named_after_a_while(compiled_program):
    """The count of finished items is put back again and again, and a sleep takes no time."""
    config = SMALL.with_(dim=256, hidden_dim=1024, max_seq_len=128, head_dim=64)
    runtime = make_runtime(compiled_program, config, weights_of(config), threads=2)
    ids = list(range(61)) * 2
    logits_of(runtime, ids)
    sleep = runtime.state[State.SLEEP]
    library = ctypes.CDLL(None)
    runtime.state[State.SLEEP] = ctypes.cast(library.labs, ctypes.c_void_p).value or 0
    done = threading.Event()

    def put_back() -> None:
        while not done.is_set():
            runtime._sync[Sync.FINISHED] = -(10**9)

    def until_late() -> None:
        for _ in range(1000):  # the count is put back amid a call: mostly in the first
            logits_of(runtime, ids)

    thread = threading.Thread(target=put_back)
    thread.start()
    try:
        with pytest.raises(EngineTimeout, match="stage .* within a minute; start again"):
            until_late()
    finally:
        done.set()
        thread.join()
        runtime.state[State.SLEEP] = sleep
    # the late thread may still write into the buffers
    with pytest.raises(EngineTimeout, match="stuck"):
        logits_of(runtime, ids)
