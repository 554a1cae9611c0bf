"""Micro-steps that hide a compilation: published tables, boundaries, what a run measures."""

import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onelaunch.compilation.schedule import (
    COMPILATIONS,
    NOISE,
    STEPS,
    MicroStepEstimator,
    micro_steps_to_hide,
    stall_seconds,
    throughput,
)
from onelaunch.errors import BadInput

TIMES = st.floats(1e-6, 1e6)
SLOWDOWNS = st.floats(1.0, 20.0)
NOT_TIMES = [0.0, -0.0, -1.0, math.inf, -math.inf, math.nan]
NOT_SLOWDOWNS = [math.nextafter(1.0, 0.0), 0.0, -1.13, math.inf, math.nan]

# Published of training on an M1 Pro's neural engine, whose programs have their weights baked in.
# Micro-steps an update, seconds of one, the share of all time that compiling took, micro-steps/s.
PUBLISHED_UPDATES = [
    (10, 0.2086, 0.862, 0.66),
    (50, 0.1754, 0.550, 2.56),
    (100, 0.1694, 0.467, 3.15),
]
# Seconds of compiling for one update, from the fastest run to the slowest.
PUBLISHED_COMPILATIONS = (10.3, 15.3)
STEP_SECONDS = 0.1687  # warm, of the longest update
SLOWDOWN = 1.13  # of a call during a compilation


# the published tables


@pytest.mark.parametrize(
    ("compiling", "step", "published"),
    [(0.244, 0.003, 82), (0.512, 0.008, 64), (1.0, 0.008, 125)],
    ids=["stories15m FFN", "stories110m FFN", "stories110m 4 layers"],
)
def test_published_k(compiling, step, published):
    # the last is of one program of 4 layers; the 12 of the model take three
    assert micro_steps_to_hide(compiling, step) == published


@pytest.mark.parametrize(
    ("compiling", "step", "k", "published"),
    [(1.0, 0.003, 334, 338), (4.2, 0.008, 525, 520)],
    ids=["stories15m", "stories110m"],
)
def test_published_k_of_rounded_times(compiling, step, k, published):
    assert micro_steps_to_hide(compiling, step) == k
    # 1.2% and 1.0% off: 338 are of a step of 2.96 ms, 520 of a compilation of 4.16 s
    assert k == pytest.approx(published, rel=0.012)


def test_k_of_a_whole_micro_step():
    # "~8 ms" for stories110m is no whole micro-step: those were estimator as 168.7 ms
    assert micro_steps_to_hide(4.2, STEP_SECONDS) == 25


@pytest.mark.parametrize(("k", "step", "share", "published"), PUBLISHED_UPDATES)
def test_published_throughput_without_overlap(k, step, share, published):
    compiling = k * step * share / (1 - share)
    assert PUBLISHED_COMPILATIONS[0] < compiling < PUBLISHED_COMPILATIONS[1]
    rate = throughput(k, compiling, step, 1.0, overlapped=False)
    # 0.24%, 0.22% and 0.11% off, where two digits of 0.66 alone leave 0.8%
    assert rate == pytest.approx(published, rel=0.0025)


def test_one_compile_time_for_all_does_not_give_the_published_throughput():
    # compilations of the same programs took 13.0, 10.7 and 14.8 s; published in words: "~10s"
    rates = [
        throughput(k, 10.0, step, 1.0, overlapped=False) for k, step, _, _ in PUBLISHED_UPDATES
    ]
    assert [round(rate, 2) for rate in rates] == [0.83, 2.66, 3.71]


def test_published_throughput_with_overlap():
    for compiling in PUBLISHED_COMPILATIONS:
        rate = throughput(100, compiling, STEP_SECONDS, SLOWDOWN, overlapped=True)
        # 5.2457, published without its last digit
        assert rate == pytest.approx(5.24, rel=0.0012)
        assert stall_seconds(100, compiling, STEP_SECONDS, SLOWDOWN, overlapped=True) == 0
        # with the update's own micro-steps, less warm
        assert throughput(100, compiling, 0.1694, SLOWDOWN, True) == pytest.approx(5.24, rel=0.0031)


def test_published_asymptote():
    assert throughput(100, 10.0, STEP_SECONDS, 1.0, overlapped=True) == pytest.approx(
        5.93, rel=5e-4
    )


# micro-steps that hide


@pytest.mark.parametrize(
    ("compiling", "step", "slowdown", "k"),
    [
        (1.0, 1.0, 1.0, 1),
        (1e-9, 1.0, 1.0, 1),
        (5e-324, 1e308, 1.0, 1),
        (1.0001, 1.0, 1.0, 2),
        (2.0, 1.0, 1.0, 2),
        (0.3, 0.1, 1.0, 3),
        (2.1, 0.7, 1.0, 3),
        (0.1 + 0.2, 0.1, 1.0, 3),
        (100.0, 1.0, 1.13, 113),
        (1.0, 0.1, 1.1, 11),
        (1.0, 0.1, 1.11, 12),
        (10, 1, 1, 10),
    ],
)
def test_k(compiling, step, slowdown, k):
    assert micro_steps_to_hide(compiling, step, slowdown) == k


def test_the_quotients_that_floats_round_up_are_there():
    assert math.ceil(2.1 / 0.7) == math.ceil((0.1 + 0.2) / 0.1) == 4


@given(n=st.integers(1, 10**6), milliseconds=st.integers(1, 10**6))
@example(3, 700)
@settings(deadline=None)
def test_whole_numbers_stay_whole(n, milliseconds):
    step = milliseconds / 1000
    assert micro_steps_to_hide(n * milliseconds / 1000, step) == n
    assert micro_steps_to_hide(n * step, step) == n
    assert micro_steps_to_hide(step, step, float(n)) == n


@given(compiling=TIMES, step=TIMES, slowdown=SLOWDOWNS)
@settings(deadline=None)
def test_k_micro_steps_hide_it_and_fewer_do_not(compiling, step, slowdown):
    k = micro_steps_to_hide(compiling, step, slowdown)
    concurrent = Fraction(slowdown) * Fraction(compiling)
    assert k * Fraction(step) >= concurrent * (1 - Fraction(2 * NOISE))
    assert k == 1 or (k - 1) * Fraction(step) < concurrent


@given(compiling=TIMES, step=TIMES, slowdown=SLOWDOWNS, steps_slowdown=SLOWDOWNS)
@settings(deadline=None)
def test_k_by_micro_steps_timed_alone_is_enough(compiling, step, slowdown, steps_slowdown):
    by_alone = micro_steps_to_hide(compiling, step, slowdown)
    by_concurrent = micro_steps_to_hide(compiling, step * steps_slowdown, slowdown)
    concurrent = slowdown * compiling
    assert by_concurrent <= by_alone
    for k in (by_alone, by_concurrent):
        stall = stall_seconds(k, concurrent, step, steps_slowdown, overlapped=True)
        assert stall <= 2 * NOISE * concurrent
    if by_concurrent > 1:
        assert (
            stall_seconds(by_concurrent - 1, concurrent, step, steps_slowdown, overlapped=True) > 0
        )


@given(compiling=TIMES, step=TIMES, slowdown=SLOWDOWNS, more=SLOWDOWNS)
@settings(deadline=None)
def test_what_makes_k_larger(compiling, step, slowdown, more):
    k = micro_steps_to_hide(compiling, step, slowdown)
    assert micro_steps_to_hide(compiling, step, slowdown * more) >= k
    assert micro_steps_to_hide(compiling * more, step, slowdown) >= k
    assert micro_steps_to_hide(compiling, step * more, slowdown) <= k


# stalls and throughput


def test_an_update_that_waits():
    # 10 micro-steps of 0.2 s, 2.5 s when slowed down, during 3 s of compiling
    assert stall_seconds(10, 3.0, 0.2, 1.25, overlapped=True) == pytest.approx(0.5)
    assert throughput(10, 3.0, 0.2, 1.25, overlapped=True) == pytest.approx(10 / 3)
    assert stall_seconds(10, 3.0, 0.2, 1.25, overlapped=False) == 3.0
    assert throughput(10, 3.0, 0.2, 1.25, overlapped=False) == pytest.approx(10 / 5)


def test_an_update_that_does_not_wait():
    for k, stall, rate in [(14, 0.2, 14 / 3), (15, 0.0, 5), (16, 0.0, 5)]:
        assert stall_seconds(k, 3.0, 0.16, 1.25, overlapped=True) == pytest.approx(stall)
        assert throughput(k, 3.0, 0.16, 1.25, overlapped=True) == pytest.approx(rate)


def test_a_compilation_that_ends_early_slows_every_micro_step_of_the_model():
    early = (100, 0.5, 0.1, 1.25)
    rate = throughput(*early, overlapped=True)
    assert rate == pytest.approx(8.0)
    # 4 micro-steps run during the compilation, the other 96 alone
    truth = 100 / (4 * 0.125 + 96 * 0.1)
    assert rate < throughput(*early, overlapped=False) < truth < 1.25 * rate


@given(
    k=st.integers(1, 10**6),
    compiling=TIMES,
    step=TIMES,
    slowdown=SLOWDOWNS,
    overlapped=st.booleans(),
)
@settings(deadline=None)
def test_an_update_is_its_micro_steps_and_its_stall(k, compiling, step, slowdown, overlapped):
    arguments = (compiling, step, slowdown, overlapped)
    stall, rate = stall_seconds(k, *arguments), throughput(k, *arguments)
    each = step * (slowdown if overlapped else 1)
    assert k / rate == pytest.approx(k * each + stall)
    assert rate <= 1 / each * (1 + NOISE)
    # more micro-steps never wait longer, nor are they slower
    assert stall_seconds(k + 1, *arguments) <= stall
    assert throughput(k + 1, *arguments) >= rate * (1 - NOISE)


# bad input


@pytest.mark.parametrize("seconds", NOT_TIMES)
def test_times_are_positive_and_finite(seconds):
    for times, name in [((seconds, 1.0), "compile_seconds"), ((1.0, seconds), "step_seconds")]:
        message = rf"{name} {seconds}: .*positive"
        with pytest.raises(BadInput, match=message):
            micro_steps_to_hide(*times)
        for function in (stall_seconds, throughput):
            for overlapped in (True, False):
                with pytest.raises(BadInput, match=message):
                    function(1, *times, 1.0, overlapped)
    estimator = MicroStepEstimator(7)
    with pytest.raises(BadInput, match=f"compilation seconds {seconds}"):
        estimator.add_compilation(seconds)
    for compiling in (True, False):
        with pytest.raises(BadInput, match=f"micro-step seconds {seconds}"):
            estimator.add_micro_step(seconds, compiling)
    assert (estimator.k, estimator.is_measured, estimator.compile_seconds) == (7, False, None)


@pytest.mark.parametrize("slowdown", NOT_SLOWDOWNS)
def test_a_slowdown_is_at_least_one(slowdown):
    with pytest.raises(BadInput, match=rf"slowdown {slowdown}: .*at least 1"):
        micro_steps_to_hide(1.0, 1.0, slowdown)
    for function in (stall_seconds, throughput):
        for overlapped in (True, False):
            with pytest.raises(BadInput, match="at least 1"):
                function(1, 1.0, 1.0, slowdown, overlapped)


@pytest.mark.parametrize("times", [(1e300, 1e-300), (1.0, 5e-324), (1e308, 1.0, 10.0)])
def test_a_k_past_all_floats(times):
    with pytest.raises(BadInput, match=r"compile_seconds=.*, step_seconds=.* overflows"):
        micro_steps_to_hide(*times)


@pytest.mark.parametrize("k", [0, -1])
def test_an_update_has_a_micro_step(k):
    message = rf"{k} micro-steps per update: .*at least 1"
    for function in (stall_seconds, throughput):
        with pytest.raises(BadInput, match=message):
            function(k, 1.0, 1.0, 1.0, True)
    with pytest.raises(BadInput, match=message):
        MicroStepEstimator(k)


# what a run measures


def test_k_is_the_initial_one_until_it_is_measured():
    estimator = MicroStepEstimator(100)
    assert (estimator.k, estimator.is_measured, estimator.slowdown) == (100, False, None)
    estimator.add_micro_step(0.2, compiling=False)
    estimator.add_micro_step(0.25, compiling=True)
    assert (estimator.k, estimator.is_measured) == (100, False)
    estimator.add_compilation(10.0)
    assert (estimator.k, estimator.is_measured) == (40, True)
    assert (estimator.compile_seconds, estimator.step_seconds) == (10.0, 0.2)
    assert (estimator.step_seconds_compiling, estimator.slowdown) == (0.25, 1.25)


def test_a_compilation_without_micro_steps_measures_nothing():
    estimator = MicroStepEstimator(100)
    estimator.add_compilation(10.0)
    assert (estimator.k, estimator.is_measured) == (100, False)


def test_micro_steps_alone_replace_those_during_a_compilation():
    estimator = MicroStepEstimator(100)
    estimator.add_compilation(10.0)
    estimator.add_micro_step(0.2, compiling=False)
    assert (estimator.k, estimator.is_measured) == (50, True)
    estimator.add_micro_step(0.25, compiling=True)
    assert estimator.k == 40


def test_micro_steps_that_are_faster_during_a_compilation_are_noise():
    estimator = MicroStepEstimator(1)
    estimator.add_micro_step(0.2, compiling=False)
    estimator.add_micro_step(0.19, compiling=True)
    assert estimator.slowdown == 1.0


@given(
    times=st.lists(TIMES, min_size=1, max_size=COMPILATIONS - 1), at=st.integers(0), data=st.data()
)
@settings(deadline=None)
def test_one_interruption_changes_no_estimate_beyond_the_other_times(times, at, data):
    interrupted = max(times) * data.draw(st.floats(1.0, 1e6))
    estimator = MicroStepEstimator(1)
    at %= len(times) + 1
    for seconds in [*times[:at], interrupted, *times[at:]]:
        estimator.add_compilation(seconds)
        estimator.add_micro_step(seconds, compiling=False)
        estimator.add_micro_step(seconds, compiling=True)
    for estimate in (
        estimator.compile_seconds,
        estimator.step_seconds,
        estimator.step_seconds_compiling,
    ):
        assert min(times) <= estimate <= max(times)


def test_an_interruption_that_ruins_a_mean():
    compilations, steps = [4.2, 4.1, 34.2, 4.3], [0.17, 0.169, 2.17, 0.168]
    estimator = MicroStepEstimator(1)
    for seconds in compilations:
        estimator.add_compilation(seconds)
    for seconds in steps:
        estimator.add_micro_step(seconds, compiling=True)
    assert estimator.k == micro_steps_to_hide(4.2, 0.169) == 25
    assert micro_steps_to_hide(statistics.mean(compilations), 0.169) == 70
    assert micro_steps_to_hide(4.2, statistics.mean(steps)) == 7


def test_what_was_long_ago_is_forgotten():
    estimator = MicroStepEstimator(1)
    # of equally many the shorter counts: only a rise shows that the older ones are gone
    for seconds, compiling in [(0.169, 1.0), (0.258, 4.2)]:
        for _ in range(STEPS):
            estimator.add_micro_step(seconds, compiling=False)
            estimator.add_micro_step(2 * seconds, compiling=True)
        for _ in range(COMPILATIONS):
            estimator.add_compilation(compiling)
        assert (estimator.step_seconds, estimator.compile_seconds) == (seconds, compiling)
        assert estimator.step_seconds_compiling == 2 * seconds
    # three of the last five decide
    for _ in range(COMPILATIONS // 2):
        estimator.add_compilation(1.0)
    assert estimator.compile_seconds == 4.2
    estimator.add_compilation(1.0)
    assert estimator.compile_seconds == 1.0


@given(compiling=TIMES, step=TIMES, slowdown=SLOWDOWNS)
@settings(deadline=None)
def test_the_k_of_a_steady_run_waits_for_nothing(compiling, step, slowdown):
    estimator = MicroStepEstimator(1)
    estimator.add_compilation(compiling)
    estimator.add_micro_step(step, compiling=False)
    estimator.add_micro_step(step * slowdown, compiling=True)
    times = (estimator.compile_seconds, estimator.step_seconds, estimator.slowdown, True)
    assert stall_seconds(estimator.k, *times) <= 2 * NOISE * compiling
    if estimator.k > 1:
        assert stall_seconds(estimator.k - 1, *times) > 0
