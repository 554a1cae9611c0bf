"""Rounds: order, ratios, fits; and the reading of memory beside them."""

import random
import threading

import pytest
import torch

from onelaunch.bench import reading
from onelaunch.bench.core.compiled import compiled_program
from onelaunch.bench.core.rounds import digest, fit, in_rounds, ratio


def test_everybody_is_sampled_in_every_round_in_an_order_that_alternates():
    order = []

    def contestant(name):
        return lambda: order.append(name) or float(len(order))

    found = in_rounds({name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_a_ratio_is_of_rounds_not_of_medians():
    drift = [1.0, 10.0, 3.0, 0.5]
    assert ratio([2 * d for d in drift], drift) == 2.0
    assert ratio([1.0, 8.0, 9.0], [1.0, 2.0, 1.0]) == 4.0
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_a_fit_finds_the_price_of_a_call():
    noise = random.Random(3)
    calls = [1, 3, 5, 14, 32]
    a, b = fit(calls, [100 + 2.5 * n + noise.uniform(-0.1, 0.1) for n in calls])
    assert a == pytest.approx(100, abs=0.2)
    assert b == pytest.approx(2.5, abs=0.02)


def test_a_digest():
    assert digest([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "spread": [1.8, 4.2], "n": 5}


@pytest.mark.parametrize("n_bytes", [100, 4096, 8192, 123_456, 10_000_000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_shares_are_the_whole_in_whole_pages(n_bytes, threads):
    shares = reading.shares(n_bytes, threads)
    assert len(shares) == threads
    at = 0
    for offset, size in shares:
        assert offset == at
        assert offset % reading.ALIGN == 0
        assert size >= 0
        at += size
    assert at == n_bytes
    sizes = [size for _, size in shares]
    assert max(sizes) - min(sizes) < 2 * reading.ALIGN


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_reads_all_of_it_and_its_threads_end(monkeypatch, compiled_program, threads):
    monkeypatch.setattr(reading, "PASS_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "PASSES", 3)
    memory = torch.rand(100_000)
    program = _program()
    seen, call = [], program.call

    def counting(operation, address, a, b):
        seen.append((address, b))
        return call(operation, address, a, b)

    monkeypatch.setattr(program, "call", counting)
    size = 4 * len(memory)
    with reading.reader(program, memory.data_ptr(), size, threads) as read:
        assert read() > 0
        assert len({thread.name for thread in threading.enumerate()} & {"reader 0"}) == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("reader")]
    parts = {(memory.data_ptr() + offset, n) for offset, n in reading.shares(size, threads)}
    assert set(seen) == parts
    assert len(seen) == 3 * 3 * threads  # passes, and repeats up to PASS_BYTES


def _program():
    return compiled_program(print)
