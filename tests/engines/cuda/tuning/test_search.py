"""What is timed in which order, with a made-up device."""

from __future__ import annotations

import math

import pytest

from onelaunch.config import preset
from onelaunch.engines.cuda.blocking import default, default_fused
from onelaunch.engines.cuda.forms import Form
from onelaunch.engines.cuda.tuning.search import COMPILING, DEPTHS, TILES, Search
from onelaunch.engines.cuda.tuning.space import H200, WRITES_X
from onelaunch.engines.cuda.tuning.store import asdict, read_choice
from onelaunch.errors import RunFailed

CONFIG = preset("stories15m")
RULE = default(CONFIG, 256, 2)


class Device:
    """Takes what `cost` says for a form."""

    def __init__(self, cost) -> None:
        self.cost = cost
        self.compiled, self.timed, self.heard = [], [], []

    def compile(self, jobs):
        self.compiled += jobs

    def time_us(self, form):
        self.timed.append(form)
        return self.cost(form)

    def progress(self, phase, done, total):
        assert 0 <= done <= total
        self.heard.append(phase)

    def choose(self):
        search = Search(CONFIG, 1, 256, 2, self.compile, self.time_us, progress=self.progress)
        choice = search.run()
        assert choice.tried == len(self.timed)
        read_choice(asdict(choice), CONFIG.n_layers)  # it can be read again
        return choice


def flat(staged, **fused):
    """So many microseconds for each form, whatever the tiles."""
    return lambda c: staged if c.name == "staged" else fused.get(f"d_{c.name}", math.inf)


def test_the_fastest_form_is_chosen_and_every_form_is_told():
    device = Device(
        flat(100.0, d_all=80.0, d_half=150.0, d_1=140.0, d_2=130.0, d_4=120.0, d_6=70.0)
    )
    choice = device.choose()
    assert choice.form == "6"
    assert choice.programs == H200.multiprocessors
    assert choice.us == {
        "rule": 100.0, "staged": 100.0, "all": 80.0,
        "half": 150.0, "1": 140.0, "2": 130.0, "4": 120.0, "6": 70.0,
    }  # fmt: skip
    assert choice.blockings == default_fused(CONFIG, 256, 2)
    assert device.timed[0] == Form("staged", RULE)
    assert [c.name for c in device.timed[-2:]] == ["staged", "6"], (
        "the last two are looked at again"
    )


@pytest.mark.parametrize(("fused", "form"), [(96.9, "all"), (97.1, "staged"), (100.0, "staged")])
def test_one_launch_a_stage_wins_ties(fused, form):
    choice = Device(flat(100.0, d_all=fused)).choose()
    assert choice.form == form
    assert (choice.programs is None) == (form == "staged")


def test_the_tiles_found_are_those_chosen():
    """A cost that likes other tiles than the rule's, in every kind."""

    def cost(c):
        if c.name != "staged":
            return math.inf
        b = c.blockings
        return (
            100.0
            + (0 if b["qkv"].rows == 64 else 10)
            + (0 if b["attention"].columns == 128 else 10)
            + (0 if b["down"].columns == 64 else 10)
            + (0 if b["head"].library else 10)
        )

    choice = Device(cost).choose()
    assert choice.us["rule"] == 140.0
    assert choice.us["staged"] == 100.0
    assert choice.form == "staged"
    assert choice.blockings["qkv"].rows == 64
    assert choice.blockings["attention"].columns == 128
    assert {choice.blockings[kind].columns for kind in WRITES_X} == {64}
    assert choice.blockings["head"].library


def test_one_launch_takes_tiles_of_four_warps():
    def cost(c):
        if c.name == "staged":
            return 100.0 - 5 * (c.blockings["head"].warps == 8)
        return 80.0 if c.blockings["head"].warps == 8 or c.blockings["head"].library else 90.0

    device = Device(cost)
    choice = device.choose()
    assert choice.form == "all"
    assert choice.us["all"] == 90.0
    assert all(b.warps == 4 for b in choice.blockings.values())
    whole = [job for job in device.compiled if job.form.name == "all"]
    assert whole[0].form.blockings == default_fused(CONFIG, 256, 2)
    assert all(b.warps == 4 for job in whole for b in job.form.blockings.values())
    programs = [c.programs for c in device.timed if c.name == "all"]
    assert set(programs) == {132, 264}


def test_more_programs_where_they_pay():
    device = Device(lambda c: 100.0 if c.name == "staged" else {132: 90.0, 264: 60.0}[c.programs])
    choice = device.choose()
    assert choice.programs == 264
    assert {c.programs for c in device.timed if c.name in ("half", "1")} == {264}


def test_what_is_timed_was_compiled_before():
    """Of one kernel per stage: what is compiled in time, no tile waits for."""
    device = Device(flat(100.0))
    device.choose()
    compiled = {(job.kind, job.form.blockings[job.kind]) for job in device.compiled if job.kind}
    for form in device.timed:
        if form.name == "staged":
            for kind in ("attention", *WRITES_X, "qkv", "gate_up", "head"):
                tile = form.blockings[kind]
                assert tile == RULE[kind] or (kind, tile) in compiled, (kind, tile)


def test_progress_is_heard_of_each_phase():
    device = Device(flat(100.0, d_all=90.0))
    device.choose()
    assert list(dict.fromkeys(device.heard)) == [TILES, DEPTHS]
    assert COMPILING not in device.heard, "that is the compiler's"


def test_kernels_that_read_sums_of_squares_are_compiled_for_every_width():
    device = Device(flat(100.0))
    device.choose()
    for kind in ("qkv", "gate_up", "head"):
        widths = {j.form.blockings["down"].columns for j in device.compiled if j.kind == kind}
        assert widths == {32, 64}
    assert {c.blockings["down"].columns for c in device.timed} == {32, 64}
    kinds = {job.kind for job in device.compiled}
    assert kinds == {*RULE, None}


def test_where_nothing_runs_there_is_no_choice():
    with pytest.raises(RunFailed, match="1x256: no form of it runs"):
        Device(lambda c: math.inf).choose()
    choice = Device(lambda c: math.inf if c.blockings == RULE else 100.0).choose()
    assert "rule" not in choice.us
    assert choice.blockings != RULE
