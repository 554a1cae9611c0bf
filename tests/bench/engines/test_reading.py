"""The reading of memory next to generation: its shares, its threads."""

import threading

import pytest
import torch

from onelaunch.bench.core.compiled import compiled_program
from onelaunch.bench.engines.generate import reading


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
