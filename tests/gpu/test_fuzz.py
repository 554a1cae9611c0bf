"""Delays about waits and publications change no bit; `tests/soak.py forward` tries more seeds."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.fuzzing import CASES, Fuzzed

SEEDS = range(1, 9)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_delays_change_no_bit(case):
    assert Fuzzed(case).wrong(SEEDS) == []


def test_delays_take_time():
    """Or the test above would try nothing."""
    fuzzed = Fuzzed(CASES["one program"])

    def milliseconds(forward):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(10):
            forward.run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    assert milliseconds(fuzzed.forward) > 1.2 * milliseconds(fuzzed.plain)
