"""Child processes that compile: jobs shared out, failures told, ends. The children here are told
what to do by their jobs; that the real one compiles is tested on a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from onelaunch.compilation.children import Child
from onelaunch.config import preset
from onelaunch.engines.cuda import compilers
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.compilers import NOT_IN_TIME, Compilers, Job, Subject, how_many
from onelaunch.errors import RunFailed

CONFIG = preset("stories15m")
SUBJECT = Subject(CONFIG, "bfloat16", 0)
TILES = default(CONFIG, 256, 2)
CHILD = """
import json, os, sys, time
subject = json.loads(sys.stdin.readline())
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    doing = job["form"]
    if doing == "die":
        os._exit(3)
    if doing == "warn":
        print("so " * 100_000 + "\\nthe last words", file=sys.stderr, flush=True)
    if doing == "sleep":
        time.sleep(600)
    if doing == "who":
        print(json.dumps(f"{os.getpid()} {subject['config']['dim']}"), flush=True)
    else:
        time.sleep(0.05)
        print(json.dumps(None if doing == "fine" else doing), flush=True)
"""
COMMAND = (sys.executable, "-c", CHILD)


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """For a child that has yet to end to say why, however busy the machine is."""
    monkeypatch.setattr("onelaunch.compilation.children.ENDING_SECONDS", 60.0)


@pytest.fixture
def pool():
    made = []

    def make(count, **options):
        made.append(Compilers(SUBJECT, count, command=COMMAND, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def jobs(*doing):
    return [Job(256, each, TILES) for each in doing]


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_answers_stand_where_their_jobs_do(pool):
    doing = ["fine", "too large", "fine", "no such thing"] * 5
    why = pool(3).compile(jobs(*doing), soon())
    assert why == [None if each == "fine" else each for each in doing]


def test_children_share_the_work_and_stay_for_the_next(pool):
    children = pool(3)
    seen = children.compile(jobs(*["who"] * 30), soon())
    assert len(set(seen)) == 3
    assert all(each.endswith(" 288") for each in seen)
    assert set(children.compile(jobs("who"), soon())) < set(seen), "one stays"
    assert len(set(children.compile(jobs(*["who", "fine"] * 10), soon())) - {None}) == 3
    assert children.compile([], soon()) == []


def test_what_a_child_dies_of_has_failed_and_the_others_go_on(pool):
    why = pool(2).compile(jobs("die", *["fine"] * 6), soon())
    ended = "the compiler ended (exit status 3)"
    assert why == [ended, *[None] * 6]
    why = pool(1).compile(jobs("fine", "die", "fine"), soon())
    assert why == [None, ended, NOT_IN_TIME]


def test_a_dead_child_is_replaced_for_the_next_jobs(pool):
    children = pool(1)
    assert children.compile(jobs("die"), soon()) == ["the compiler ended (exit status 3)"]
    assert children.compile(jobs("fine"), soon()) == [None]


def test_a_child_that_says_much_on_standard_error_goes_on_and_its_last_line_is_the_reason(pool):
    assert pool(1).compile(jobs("warn", "fine"), soon()) == ["warn", None]
    why = pool(1).compile(jobs("warn", "die"), soon())
    assert why == ["warn", "the compiler ended (the last words)"]


def test_a_pipe_that_is_closed_is_told_nothing(pool):
    child = Child(COMMAND)
    child.end()
    assert not child.tell("x")
    assert child.hear() == ""
    assert child.reason()


def test_what_is_not_done_in_time_is_given_up(pool):
    children = pool(2)
    assert children.compile(jobs("fine", "fine"), soon()) == [None, None]  # they have started
    why = children.compile(jobs("sleep", "sleep", "fine"), soon(1.0))
    assert why == [NOT_IN_TIME] * 3


BUSY = """
import os, subprocess, sys
from onelaunch.engines.cuda import compilers
class Busy:
    def __init__(self, subject):
        pass
    def __call__(self, job):
        assembler = subprocess.Popen(["sleep", "60"])
        with open(job["form"], "w") as file:
            print(os.getpid(), assembler.pid, file=file, flush=True)
        assembler.wait()
compilers._Compiler = Busy
compilers.main()
"""


def test_children_end_with_their_parent_whatever_they_are_at(tmp_path):
    at_work = tmp_path / "at work"
    program = f"""
import sys, time
from onelaunch.config import preset
from onelaunch.engines.cuda.compilers import Compilers, Job, Subject
subject = Subject(preset('stories15m'), 'bfloat16', 0)
children = Compilers(subject, 1, command=(sys.executable, '-c', {BUSY!r}))
children.compile([Job(1, {str(at_work)!r}, {{}})], time.monotonic() + 60)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as parent:
        try:
            assert _soon(lambda: at_work.exists() and at_work.read_text().endswith("\n"))
        finally:
            parent.kill()
    pids = [int(pid) for pid in at_work.read_text().split()]
    assert len(pids) == 2
    assert _soon(lambda: not any(map(_runs, pids))), "they outlived their parent"


def _soon(holds):
    end = time.monotonic() + 30
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_real_child_without_a_gpu_has_failed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    children = Compilers(SUBJECT, 1)
    try:
        (why,) = children.compile(jobs("staged"), soon())
        assert re.fullmatch(r"the compiler ended \(\w+Error: .+\)", why)
    finally:
        children.close()


def test_as_many_children_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(compilers, "usable_cores", lambda: 64)
    assert how_many(CONFIG, 256, 2, 140 << 30) == 15
    assert how_many(CONFIG, 256, 2, 8 << 30) == 3
    assert how_many(CONFIG, 64 * 2048, 2, 140 << 30) == 15
    assert how_many(CONFIG, 64 * 2048, 2, 28 << 30) == 4, "two forms of so many rows have room too"
    assert how_many(CONFIG, 64 * 2048, 2, 16 << 30) == 0
    assert how_many(CONFIG, 256, 2, 2 << 30) == 0
    monkeypatch.setattr(compilers, "usable_cores", lambda: 4)
    assert how_many(CONFIG, 256, 2, 140 << 30) == 3
    monkeypatch.setattr(compilers, "usable_cores", lambda: 1)
    assert how_many(CONFIG, 256, 2, 140 << 30) == 1
    with pytest.raises(RunFailed, match="too little of the device's memory"):
        Compilers(SUBJECT, 0)


def test_an_answer_is_nothing_or_a_reason():
    def work(job):
        if job["form"]:
            raise ValueError(job["form"])

    assert compilers._answer(work, '{"form": ""}') == "null"
    assert compilers._answer(work, '{"form": "no room"}') == '"no room"'
    assert compilers._answer(work, "{}") == "\"'form'\""
    assert len(compilers._answer(work, '{"form": "%s"}' % ("x" * 9000))) < 300
