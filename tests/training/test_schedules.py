"""The learning rate of each schedule, on both sides of where it changes."""

import math

import pytest

from onelaunch.training.recipe import Recipe


def rates(schedule: str, updates: int = 100, beyond: int = 3, **changed) -> list[float]:
    """Of each update, and of some after the last, in a run with a peak of 2."""
    settings = {"train.updates": updates, "optimizer.lr": 2.0, "optimizer.schedule": schedule}
    settings |= {"optimizer.warmup": 10, "optimizer.min_lr_ratio": 0.1}
    settings |= {f"optimizer.{key}": value for key, value in changed.items()}
    recipe = Recipe().with_settings(settings, "test")
    return [recipe.learning_rate(update) for update in range(updates + beyond)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_all_warm_up_to_the_peak(schedule):
    got = rates(schedule)
    assert got[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert got[10] == 2.0
    assert rates(schedule, warmup=0)[0] == 2.0
    assert max(got) == 2.0


def test_constant_stays():
    assert set(rates("constant")[10:]) == {2.0}


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_end_of_the_run():
    got = rates("cosine")
    assert got[11] < 2.0
    assert got[55] == pytest.approx(1.1)
    assert got[99] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 89 / 90)))
    assert got[100:] == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.01])
def test_wsd_is_stable_and_then_falls_linearly(fraction):
    got = rates("wsd", decay_fraction=fraction)
    decay = round(100 * fraction)
    start = 100 - decay
    assert set(got[10 : start + 1]) == {2.0}
    for n, rate in enumerate(got[start:100]):
        assert rate == pytest.approx(2.0 - 1.8 * n / decay)
    assert got[100:] == pytest.approx([0.2] * 3)


def test_wsd_without_a_decay_is_constant_and_with_nothing_else_linear():
    assert rates("wsd", beyond=0, decay_fraction=0.0) == rates("constant", beyond=0)
    all_of_it = rates("wsd", decay_fraction=1.0)
    assert all_of_it[10:100] == pytest.approx([2.0 - 1.8 * n / 90 for n in range(90)])


def test_a_warm_up_that_reaches_into_the_decay_leaves_it_the_rest():
    got = rates("wsd", warmup=95, decay_fraction=0.5)
    assert got[94:100] == pytest.approx([2.0, 2.0, 1.64, 1.28, 0.92, 0.56])
    longer = rates("wsd", warmup=200, decay_fraction=0.5)
    assert longer[:100] == pytest.approx([0.01 * n for n in range(1, 101)])
