"""The clock on a GPU, of which there is none here: events that record a time of the test's."""

from __future__ import annotations

import pytest
import torch

from onelaunch.training.clock import STEP, StepClock


class Device:
    """What has passed on it, in milliseconds, and how many events were recorded."""

    now = 0.0
    recorded = 0


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = float("nan")

    def record(self, stream: object) -> None:
        self.at = Device.now
        Device.recorded += 1

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    Device.now, Device.recorded = 100.0, 0
    return StepClock(torch.device("cuda"))


def passed(ms: float) -> None:
    Device.now += ms


def test_parts_of_updates_that_follow_one_another(clock):
    passed(50)  # before the first: of no update
    clock.begin()
    read = []
    for _ in range(3):
        passed(1)
        clock.skip()
        passed(2)
        clock.mark("data")
        passed(4)
        clock.mark("forward")
        read.append(clock.end_later())
        clock.begin()
    for each in read:
        seconds = each()
        assert seconds["data"] == pytest.approx(2e-3)
        assert seconds["forward"] == pytest.approx(4e-3)
        assert seconds["wall"] == pytest.approx(7e-3)
        assert seconds["unexplained"] == pytest.approx(1e-3)
        assert STEP not in seconds


def test_an_update_whose_parts_are_not_asked_for_takes_one_event(clock):
    clock.begin(apart=False)
    before = Device.recorded
    read = []
    for evaluates in (False, True, False):
        passed(1)
        clock.skip()
        passed(2)
        clock.mark("data")
        if evaluates:
            clock.skip("evaluation")
            passed(30)
            clock.mark("evaluation")
        passed(4)
        clock.mark("forward")
        read.append(clock.end_later())
        clock.begin(apart=False)
        if len(read) > 1:  # the one before, when the next one is under way
            read[-2] = read[-2]()
    read[-1] = read[-1]()
    assert Device.recorded - before == 3 + 2
    for seconds, evaluation in zip(read, (0.0, 30e-3, 0.0), strict=True):
        assert seconds[STEP] == pytest.approx(7e-3)
        assert seconds["evaluation"] == pytest.approx(evaluation)
        assert seconds["data"] == seconds["forward"] == 0.0
        assert seconds["wall"] == pytest.approx(7e-3 + evaluation)
        assert seconds["unexplained"] == pytest.approx(0.0)


def test_events_are_used_again(clock):
    made = set()
    for update in range(20):
        clock.begin(apart=update % 3 == 0)
        passed(1)
        clock.mark("data")
        made.update(id(event) for _, event in clock._events)
        clock.end()
    assert len(made) < 8
