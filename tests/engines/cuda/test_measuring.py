"""What is measured in a process of its own: turns given, answers believed only where they are
choices, ends. The children here do what they are told; the real one is tested on a GPU."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.compilation.children import Child
from onelaunch.config import preset
from onelaunch.engines.cuda import measuring
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.choice import Choice, facts_of, find
from onelaunch.engines.cuda.compilers import form_bytes
from onelaunch.engines.cuda.turns import measuring_alone, turns_of
from onelaunch.errors import RunFailed

CONFIG = preset("stories260k")
DEVICE = {"device": "made up", "multiprocessors": 4, "torch": "1", "triton": "2"}
CHOICE = Choice("staged", default(CONFIG, 256, 2), None, {"staged": 5.0}, 1.5, 7, "today")
CHILD = f"""
import json, os, sys, time
subject = json.loads(sys.stdin.readline())
def turn(seconds):
    print("turn", flush=True)
    assert sys.stdin.readline() == "go\\n"
    time.sleep(seconds)
    print("over", flush=True)
answer = json.loads({json.dumps(asdict(CHOICE))!r})
"""


CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "device_facts", lambda device: DEVICE)
    properties = SimpleNamespace(uuid="made up")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    return Store(tmp_path / "store")


def choose(store, does, sequence=200, **options):
    command = (sys.executable, "-c", CHILD + does)
    return measuring.choose(
        CONFIG, torch.bfloat16, CPU, 1, sequence, store, command=command, **options
    )


def test_what_a_child_finds_is_kept(store):
    does = "turn(0); turn(0); assert subject['sequence'] == 200; print(json.dumps(answer))"
    assert choose(store, does) == CHOICE
    assert find(store, facts_of(CONFIG, "bfloat16", 1, 256, DEVICE)) == CHOICE


def test_a_child_waits_for_its_turn_and_the_device_is_its_own_then(store):
    turns, seen = turns_of(CPU), []

    class Used:
        def synchronize(self):
            seen.append(turns._owner)

    does = "turn(0.2); turn(0.2); print(json.dumps(answer))"
    choose(store, does, used=Used())
    assert len(set(seen)) == len(seen) == 2
    assert turns._owner is None


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
    assert turns_of(CPU)._owner is None, "whatever happened, others have their turn"


def test_it_can_be_cancelled_and_a_child_that_hangs_ends(store, monkeypatch):
    began = time.monotonic()
    with pytest.raises(RunFailed, match="cancelled"):
        choose(store, "time.sleep(600)", cancelled=lambda: time.monotonic() > began + 0.5)
    monkeypatch.setattr(measuring, "LONGEST_TURN", 0.5)
    with pytest.raises(RunFailed, match="hangs"):
        choose(store, "turn(600)")
    monkeypatch.setattr(measuring, "LONGEST_SECONDS", 0.5)
    with pytest.raises(RunFailed, match="hangs"):
        choose(store, "turn(0); time.sleep(600)")
    assert time.monotonic() - began < 300, "it waited for a child's sleep"
    assert turns_of(CPU)._owner is None


def test_nothing_is_measured_where_it_could_take_memory_that_others_need(store, monkeypatch):
    needed = (
        (1 << 30)
        + 2 * (CONFIG.n_params + CONFIG.vocab_size * CONFIG.dim)
        + 2 * form_bytes(CONFIG, 256, 2)
    )
    free = needed - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 8 << 30))
    with pytest.raises(RunFailed, match=r"measuring takes 1\.0 GiB .*, 1\.0 are free"):
        choose(store, "raise SystemExit(3)")
    free = needed
    assert choose(store, "print(json.dumps(answer))") == CHOICE


def test_one_measures_at_a_time_and_the_next_takes_what_it_found(store, tmp_path):
    found, gate = [], tmp_path / "gate"
    does = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\nprint(json.dumps(answer))"
    first = threading.Thread(target=lambda: found.append(choose(store, does)))
    first.start()
    assert _soon(lambda: list(store.folder.glob("*.lock")))
    with pytest.raises(RunFailed, match="cancelled"):
        choose(store, "print([])", cancelled=lambda: True)
    threading.Timer(0.2, gate.touch).start()
    assert choose(store, "print([])") == CHOICE
    first.join()
    assert found == [CHOICE]


def test_who_waits_too_long_for_another_measurement_gives_up(store, monkeypatch):
    monkeypatch.setattr(measuring, "LONGEST_SECONDS", 0.3)
    with (
        measuring_alone(store, CPU, lambda: False, 0),
        pytest.raises(RunFailed, match="another process is measuring"),
    ):
        choose(store, "print(json.dumps(answer))")


def test_without_a_store_that_can_be_used_nothing_is_locked_and_a_choice_is_found(store):
    store.folder.write_text("a file")
    with measuring_alone(store, CPU, lambda: False, 0):
        assert choose(store, "print(json.dumps(answer))") == CHOICE


def _soon(holds):
    end = time.monotonic() + 30
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_without_a_gpu_the_child_says_what_failed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    subject = {"config": CONFIG.to_dict(), "dtype": "bfloat16", "device": 0, "batch": 1}
    child = Child(measuring.COMMAND)
    try:
        assert child.tell(json.dumps(subject | {"sequence": 8}))
        assert json.loads(child.hear())["failed"]
    finally:
        child.end()
