"""Rounds: order, ratios, fits."""

import random

import pytest

from onelaunch.bench.core.rounds import digest, fit, in_rounds, ratio


def test_each_is_sampled_in_every_round_in_an_order_that_alternates():
    order = []

    def contestant(name):
        return lambda: order.append(name) or float(len(order))

    samples = in_rounds({name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert samples == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


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
