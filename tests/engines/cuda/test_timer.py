"""How a choice is brought about: what is compiled for which shape, and what is kept. Nothing runs:
children, timer and device are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.cuda import timer
from onelaunch.engines.cuda.choice import find
from onelaunch.engines.cuda.measure import Candidate
from onelaunch.engines.cuda.program import Shape
from onelaunch.engines.cuda.search import Limits
from onelaunch.errors import RunFailed

CONFIG = preset("stories15m")
PACKED = SimpleNamespace(
    embedding=SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16)
)
DEVICE = {"device": "made up", "multiprocessors": 4, "torch": "2", "triton": "3"}


class Children:
    made = None

    def __init__(self, subject, count):
        self.subject, self.count = subject, count
        self.jobs, self.closed = [], False
        Children.made = self

    def compile(self, jobs, deadline):
        self.jobs.append(list(jobs))
        return [None] * len(jobs)

    def close(self):
        self.closed = True


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setattr(timer, "Compilers", Children)
    monkeypatch.setattr(timer, "limits_of", lambda device: Limits(4))
    monkeypatch.setattr(timer, "device_facts", lambda device: DEVICE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 9 << 30))
    _takes(monkeypatch, staged=100.0, fused=120.0)


def _takes(monkeypatch, staged, fused):
    def made(*given):
        return lambda candidate: staged if candidate.form == "staged" else fused

    monkeypatch.setattr(timer, "Timer", made)


def choose(store, batch, sequence, **options):
    return timer.choose(CONFIG, PACKED, batch, sequence, store, **options)


def test_a_choice_is_measured_at_its_own_size_and_kept(store):
    choice = choose(store, 1, 256)
    assert choice.form == "staged"
    assert find(store, timer.facts(CONFIG, PACKED, 1, 200)) == choice
    children = Children.made
    assert children.closed
    assert (children.subject.device, children.subject.dtype) == (1, "bfloat16")
    assert {j.sequence for jobs in children.jobs for j in jobs} == {256}


def test_of_one_launch_the_one(store, monkeypatch):
    _takes(monkeypatch, staged=100.0, fused=50.0)
    choice = choose(store, 1, 100)
    assert (choice.form, choice.programs) == ("all", 4)
    assert {job.sequence for jobs in Children.made.jobs for job in jobs} == {128}


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.undo()
    packed = SimpleNamespace(embedding=torch.empty(2, 2))
    return timer.Timer(CONFIG, packed, Shape(2, 300))


def test_a_timer_says_inf_for_what_does_not_run(timed, monkeypatch):
    monkeypatch.setattr(timed, "_median", lambda candidate: candidate)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timed(3.0) == 3.0
    assert timed._least == 3.0

    def fails(candidate):
        raise RuntimeError("too many blocks")

    monkeypatch.setattr(timed, "_median", fails)
    assert timed(3.0) == float("inf")


def test_where_nothing_runs_any_more_nothing_is_chosen(timed, monkeypatch):
    def fails(candidate):
        raise RuntimeError("an illegal address")

    def broken(device):
        raise RuntimeError("still an illegal address")

    monkeypatch.setattr(timed, "_median", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RunFailed, match=r"all broke the device: RuntimeError: an illegal address"):
        timed(Candidate("all", {}))

    def full(candidate):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(timed, "_median", full)
    with pytest.raises(RunFailed, match="no memory"):
        timed(Candidate("all", {}))


def test_wrong_logits_are_no_candidates(timed):
    rule = torch.randn(200, 7)
    timed._compare(rule)
    timed._compare(rule * 1.01)
    for wrong in (rule * 1.2, rule.where(rule != rule[3, 3], float("nan"))):
        with pytest.raises(RunFailed, match="from the rule's"):
            timed._compare(wrong)
    assert timed._every == 3
