"""What each kind of a step's work takes, of events that are the test's: there is no GPU here."""

from __future__ import annotations

import pytest
import torch

from onelaunch.engines.cuda.training import kinds
from onelaunch.engines.cuda.training.kinds import KINDS, KindEvents, launched
from onelaunch.engines.cuda.training.side_stream import SideStream


class Event:
    now = 0.0
    done = True

    def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
        assert enable_timing
        assert external

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.done

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_seconds_are_by_part_and_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    events = KindEvents()
    with events.watching("forward"):
        for kind, ms in (("product", 2.0), ("norm", 1.0), ("product", 3.0)):
            Event.now += ms
            launched(kind)
    Event.now += 100.0
    launched("norm")  # nobody watches
    seconds = events.seconds()
    assert seconds == pytest.approx({"forward_product": 5e-3, "forward_norm": 1e-3})
    monkeypatch.setattr(Event, "done", False)
    assert events.seconds() is None


def test_nobody_watches_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with pytest.raises(RuntimeError), KindEvents().watching("forward"):
        raise RuntimeError
    assert kinds._watchers == []


def test_beside_at_once_has_no_stream():
    side_stream = SideStream(torch.device("cpu"))
    done = []
    with side_stream.at_once():
        assert side_stream.run(lambda: done.append(1)) is None
    assert done == [1]


def test_every_kernel_of_a_micro_step_has_a_kind():
    pytest.importorskip("triton")
    from onelaunch.engines.cuda.training import launches, swiglu_products
    from onelaunch.engines.cuda.training.update import adamw_kernel, sum_of_squares_kernel

    modules = (*map(launches.__dict__.get, ("attention", "loss", "rotary", "rows", "update")),)
    names = {name for m in (*modules, swiglu_products) for name in vars(m) if name[0] != "_"}
    kernels = {name for name in names if name.endswith("_kernel")}
    assert kernels - {"adamw_kernel", "sum_of_squares_kernel"} == set(KINDS)
    assert adamw_kernel.__name__ == "adamw_kernel"
    assert sum_of_squares_kernel.__name__ not in KINDS
