"""What is measured in a process of its own: turns given, answers believed only where they are
choices, ends. The children here do what they are told; the real one is tested on a GPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.cuda import measuring
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.children import Child
from onelaunch.engines.cuda.choice import Choice, facts_of, find
from onelaunch.engines.cuda.turns import turns_of
from onelaunch.errors import RunFailed

CONFIG = preset("stories260k")
DEVICE = {"device": "made up", "multiprocessors": 4, "torch": "1", "triton": "2"}
CHOICE = Choice("staged", default(CONFIG, 256, 2), None, {"staged": 5.0}, 1.5, 7, "today")
CHILD = f"""
import json, sys, time
subject = json.loads(sys.stdin.readline())
def turn(seconds):
    print("turn", flush=True)
    assert sys.stdin.readline() == "go\\n"
    time.sleep(seconds)
    print("over", flush=True)
answer = json.loads({json.dumps(asdict(CHOICE))!r})
"""


class Packed:
    embedding = torch.empty(4, 4, dtype=torch.bfloat16)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(
        measuring, "facts", lambda *given: facts_of(CONFIG, "bfloat16", *given[2:], DEVICE)
    )
    return Store(tmp_path / "store")


def choose(store, does, **options):
    command = (sys.executable, "-c", CHILD + does)
    return measuring.choose(CONFIG, Packed(), 1, 200, store, command=command, **options)


def test_what_a_child_finds_is_kept(store):
    does = "turn(0); turn(0); assert subject['sequence'] == 200; print(json.dumps(answer))"
    assert choose(store, does) == CHOICE
    assert find(store, facts_of(CONFIG, "bfloat16", 1, 256, DEVICE)) == CHOICE


def test_a_child_waits_for_its_turn_and_the_device_is_its_own_then(store):
    turns, seen = turns_of(torch.device("cpu")), []

    class Used:
        def synchronize(self):
            seen.append(turns._queue[0])

    does = "turn(0.2); turn(0.2); print(json.dumps(answer))"
    began = time.monotonic()
    choose(store, does, used=Used())
    assert time.monotonic() - began > 0.4
    assert len(set(seen)) == len(seen) == 2
    assert not turns._queue


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("raise SystemExit(3)", r"ended \(exit status 3\)"),
        ("turn(0); raise ValueError('no such tile')", r"ended \(ValueError: no such tile\)"),
        ("print('turn', flush=True)", "ended"),
        ("print('turn\\nturn', flush=True); time.sleep(60)", "no answer"),
        ("print(json.dumps({'failed': 'out of memory'}))", "out of memory"),
        ("print('nothing')", "no answer"),
        ("print([])", "no answer"),
        ("answer['form'] = 'sideways'; print(json.dumps(answer))", "no choice"),
        ("del answer['us']; print(json.dumps(answer))", "no choice"),
    ],
)
def test_what_is_no_choice_is_not_kept(store, does, message):
    with pytest.raises(RunFailed, match=message):
        choose(store, does)
    assert store.entries() == []
    assert not turns_of(torch.device("cpu"))._queue, "whatever happened, others have their turn"


def test_it_can_be_cancelled_and_a_child_that_hangs_ends(store, monkeypatch):
    began = time.monotonic()
    with pytest.raises(RunFailed, match="cancelled"):
        choose(store, "time.sleep(60)", cancelled=lambda: time.monotonic() > began + 0.5)
    monkeypatch.setattr(measuring, "LONGEST_TURN", 0.5)
    with pytest.raises(RunFailed, match="hangs"):
        choose(store, "turn(60)")
    monkeypatch.setattr(measuring, "LONGEST_SECONDS", 0.5)
    with pytest.raises(RunFailed, match="hangs"):
        choose(store, "turn(0); time.sleep(60)")
    assert time.monotonic() - began < 20
    assert not turns_of(torch.device("cpu"))._queue


def test_without_a_gpu_the_child_says_what_failed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    subject = {"config": CONFIG.to_dict(), "dtype": "bfloat16", "device": 0, "batch": 1}
    child = Child(measuring.COMMAND)
    try:
        assert child.tell(json.dumps(subject | {"sequence": 8}))
        assert json.loads(child.hear())["failed"]
    finally:
        child.end()
