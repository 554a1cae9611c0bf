"""What depends on the host is timed warm, alone, and from its quiet moments; no clock is read."""

import gc
import itertools
import os

import pytest

from onelaunch.bench.core import settled
from onelaunch.bench.core.settled import MOST_WINDOWS, PAUSE_SECONDS, WARM_UPS, WINDOW, settle


class Host:
    """A timer whose samples are as slow as the host is in each window, and slower while cold."""

    def __init__(self, *windows: float) -> None:
        self.windows = itertools.chain(windows, itertools.repeat(windows[-1]))
        self.us = next(self.windows)
        self.slept: list[float] = []
        self.taken = 0
        self.cold = 3.0

    def sample(self) -> float:
        assert not gc.isenabled()
        self.taken += 1
        value = self.us * self.cold
        self.cold = 1.0 + (self.cold - 1.0) / 100  # warm after two
        return value

    def sleep(self, seconds: float) -> None:
        assert gc.isenabled()
        self.slept.append(seconds)
        self.us, self.cold = next(self.windows), 3.0


def test_the_figure_is_that_of_the_quiet_moments_wherever_they_come():
    quiet, busy = 2200.0, 3800.0
    for places in itertools.combinations(range(6), 2):
        host = Host(*(quiet if i in places else busy for i in range(6)))
        result = settle(host.sample, least=6, sleep=host.sleep)
        assert result.agree
        assert result.samples == pytest.approx([quiet] * 2 * WINDOW, rel=1e-3)
        assert len(result.medians) == 6
        note = result.note()
        assert note["fastest"] == pytest.approx([quiet, quiet], rel=1e-3)
        assert note["of_all_windows"]["slowest"] == pytest.approx(busy, rel=1e-3)
        assert note["of_all_windows"]["median"] == pytest.approx(busy, rel=1e-3)


def test_cold_samples_do_not_count():
    host = Host(100.0)
    result = settle(host.sample, least=3, sleep=host.sleep)
    assert host.taken == 3 * (WARM_UPS + WINDOW)
    assert max(result.samples) < 101.0
    assert host.slept == [PAUSE_SECONDS] * 2


def test_it_goes_on_until_the_fastest_window_is_found_again():
    host = Host(4000.0, 2000.0, 4000.0, 4000.0, 4000.0, 2050.0, 4000.0)
    result = settle(host.sample, least=3, sleep=host.sleep)
    assert result.agree
    assert len(result.medians) == 6
    assert result.note()["fastest"] == pytest.approx([2000.0, 2050.0], rel=1e-3)


def test_it_ends_where_the_host_never_settles_and_says_so():
    host = Host(*(1.05**i for i in range(MOST_WINDOWS)))
    result = settle(host.sample, least=3, sleep=host.sleep)
    assert not result.agree
    assert result.note()["agree"] is False
    assert len(result.medians) == MOST_WINDOWS
    assert gc.isenabled()


def test_two_runs_on_a_host_that_changes_agree():
    """Stretches of quiet and of work, in another order in each run."""
    figures = []
    for start in range(7):
        stretches = [4100.0] * 9 + [2200.0 + 10 * (start % 3)] * 4 + [3100.0] * 7
        host = Host(*stretches[start:], *stretches[:start])
        figures.append(sum(settle(host.sample, sleep=host.sleep).samples) / (2 * WINDOW))
    assert max(figures) / min(figures) < 1.05


def test_the_note_says_how_busy_the_host_was(monkeypatch):
    loads = iter([(0.512, 0, 0), (3.0, 0, 0)])
    monkeypatch.setattr(os, "getloadavg", lambda: next(loads), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    note = settle(Host(10.0).sample, least=2, sleep=lambda seconds: None).note()
    assert (note["load"], note["cpus"]) == ([0.51, 3.0], 2)
    monkeypatch.delattr(os, "getloadavg")
    assert settled.load_average() is None
