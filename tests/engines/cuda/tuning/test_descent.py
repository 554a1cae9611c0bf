"""The walk through the tiles, with made-up costs."""

from __future__ import annotations

import math
import random

import pytest

from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.tuning.descent import descend
from onelaunch.engines.cuda.tuning.space import WRITES_X


def of_inner(*inners: int) -> list[Blocking]:
    return [Blocking(64, 64, inner) for inner in inners]


def separable(costs):
    """A forward that takes what its kinds take, and counts how often it is timed."""
    calls = []

    def time_us(blockings):
        calls.append(dict(blockings))
        return 100.0 + sum(costs[kind](b) for kind, b in blockings.items())

    return time_us, calls


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_a_separable_cost_is_found(seed):
    choose = random.Random(seed)
    inners = (16, 32, 64, 128, 256)
    listed = {kind: of_inner(*choose.sample(inners, 4)) for kind in ("qkv", "attention", "head")}
    table = {(k, b): choose.uniform(0, 50) for k, of in listed.items() for b in of}
    time_us, calls = separable({k: lambda b, k=k: table[k, b] for k in listed})
    found = descend(listed, time_us)
    best = {kind: min(of, key=lambda b: table[kind, b]) for kind, of in listed.items()}
    assert found.blockings == best
    assert found.us == pytest.approx(100 + sum(table[pair] for pair in best.items()))
    assert all(set(each) == set(listed) for each in calls)
    assert found.blockings == descend(listed, time_us).blockings


def test_what_shares_columns_changes_together():
    listed = {
        kind: [Blocking(rows, columns) for columns in (32, 64, 128) for rows in (16, 32, 64)]
        for kind in ("out_proj", "down")
    }
    listed["embed"] = [Blocking(16, columns) for columns in (32, 64)]  # so 128 cannot be had
    listed["qkv"] = of_inner(32, 64)
    price = {32: 40.0, 64: 10.0, 128: 0.0}
    time_us, calls = separable(
        {
            "out_proj": lambda b: price[b.columns] + b.rows,
            "down": lambda b: price[b.columns] + abs(b.rows - 32),
            "embed": lambda b: 0.0,
            "qkv": lambda b: b.block_k,
        }
    )
    found = descend(listed, time_us)
    assert found.blockings == {
        "out_proj": Blocking(16, 64),
        "down": Blocking(32, 64),
        "embed": Blocking(16, 64),
        "qkv": Blocking(64, 64, 32),
    }
    assert all(len({each[k].columns for k in WRITES_X}) == 1 for each in calls)
    assert {each["down"].columns for each in calls} == {32, 64}


def test_other_columns_that_are_no_better_are_left_again():
    listed = {kind: [Blocking(16, c) for c in (32, 64)] for kind in WRITES_X}
    time_us, _ = separable({k: lambda b: float(b.columns) for k in WRITES_X})
    found = descend(listed, time_us)
    assert {b.columns for b in found.blockings.values()} == {32}
    assert found.us == 100 + 3 * 32


def test_what_cannot_run_is_never_returned():
    listed = {"qkv": of_inner(16, 32, 64), "head": of_inner(16, 32)}

    def time_us(blockings):
        if blockings["qkv"].block_k == 16 or blockings["head"].block_k == 32:
            return math.inf
        return float(blockings["qkv"].block_k)

    found = descend(listed, time_us)
    assert found.blockings == {"qkv": Blocking(64, 64, 32), "head": Blocking(64, 64, 16)}
    assert found.us == 32.0
    nothing = descend(listed, lambda blockings: math.inf)
    assert math.isinf(nothing.us)
    assert nothing.blockings == {"qkv": Blocking(64, 64, 16), "head": Blocking(64, 64, 16)}


def test_a_lead_within_the_noise_is_looked_at_twice():
    first, second = of_inner(32, 64)

    def lead(times):
        asked = {first: iter([100.0, times[1]]), second: iter([times[0], times[2]])}
        return descend({"qkv": [first, second]}, lambda b: next(asked[b["qkv"]]))

    assert lead((99.0, 101.0, 99.5)).blockings["qkv"] == second
    confirmed_not = lead((99.0, 99.0, 100.0))
    assert confirmed_not.blockings["qkv"] == first
    assert confirmed_not.us == 100.0
    once = descend({"qkv": [first, second]}, lambda b: 100.0 if b["qkv"] == first else 90.0)
    assert once.times == {("qkv", first): 100.0, ("qkv", second): 90.0}
