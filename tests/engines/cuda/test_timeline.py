"""What is made of the times of a forward's tiles: times of a forward that was never run."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from onelaunch.engines.cuda.blocking import default, tilings
from onelaunch.engines.cuda.timeline import Span, Timeline, format_summary, perfetto, summary
from onelaunch.plan import launches, make_plan, make_tiles
from tests.engines.suite import SMALL

HOP = 700  # from a tile's end until another can see it
TURN = 30  # between tiles of a program
LAUNCH = 1000
WAITED_AT_ONCE = 10  # what looking at a counter takes
MULTIPROCESSORS = 20
START = 1_700_000_000_000_000_000


def played(depth, programs, seed=0, waits=True):
    """A timeline as the rules of a launch have it, each tile's work drawn."""
    choose = random.Random(seed)
    tiles = make_tiles(make_plan(SMALL, 2, 20), tilings(SMALL, default(SMALL, 40, 4)))
    of = launches(tiles.plan, depth)
    spans, at = [], START
    for number, launch in enumerate(of):
        free = [at + choose.randrange(50) for _ in range(programs)]
        done: dict[tuple[int, int], int] = {}
        last = tiles.phases[launch.last - 1]
        first = tiles.phases[launch.first].first
        for i, tile in enumerate(map(tiles.tile, range(first, last.first + last.tiles))):
            program = i % programs
            began = ready = free[program]
            for wait in tiles.waits(tile, launch):
                for row_tile in range(wait.first, wait.last + 1):
                    ready = max(ready, done[wait.phase, row_tile] + HOP)
            ready = max(ready, began + WAITED_AT_ONCE) if waits else began
            ended = ready + choose.randrange(400, 600)
            spans.append(
                Span(tile, number, program, program % MULTIPROCESSORS, began, ready, ended)
            )
            free[program] = ended + TURN
            done[tile[:2]] = max(ended, done.get(tile[:2], 0))
        at = max(span.ended for span in spans) + LAUNCH
    return Timeline(tiles, of, tuple(spans))


@pytest.mark.parametrize("depth", ["all", "half", 1, "stage"])
@pytest.mark.parametrize("programs", [1, 3, 50, 264])
def test_the_critical_path_has_the_whole_time(depth, programs):
    timeline = played(depth, programs)
    path = timeline.path
    assert sum(step.gap + step.span.ended - step.span.ready for step in path) == (
        timeline.ended - path[0].span.began
    )
    assert path[0].after == "start"
    assert path[-1].span.ended == timeline.ended
    for before, step in pairwise(path):
        assert step.gap == step.span.ready - before.span.ended
        if step.after == "wait":
            assert step.gap == HOP or step.span.ready == step.span.began + WAITED_AT_ONCE
        elif step.after == "turn":
            assert step.span.program == before.span.program
        else:
            assert step.after == "launch"
            assert step.span.launch == before.span.launch + 1
    assert sum(step.after == "launch" for step in path) == len(timeline.launches) - 1
    if programs == 1:
        assert {step.after for step in path} <= {"start", "turn", "launch"}
        assert len(path) == timeline.tiles.tiles


def test_a_path_in_one_launch_of_many_programs_waits_at_every_stage():
    timeline = played("all", 264)
    assert [step.span.tile.phase for step in timeline.path] == list(
        range(len(timeline.tiles.phases))
    )


def test_a_summary_counts_each_tile_once():
    timeline = played("half", 7)
    found = summary(timeline)
    kinds = found["kinds"]
    assert sum(each["tiles"] for each in kinds.values()) == timeline.tiles.tiles
    assert kinds["qkv"]["stages"] == SMALL.n_layers
    assert kinds["head"]["stages"] == 1
    assert sum(each["path_tiles"] for each in kinds.values()) == found["path"]["tiles"]
    assert sum(gap["n"] for gap in found["path"]["gaps"].values()) == found["path"]["tiles"]
    gaps = sum(gap["us"] for gap in found["path"]["gaps"].values())
    assert found["path"]["work_us"] + gaps == pytest.approx(found["us"], abs=0.05)
    assert all(0.4 <= each["work_us"] <= 0.6 for each in kinds.values())
    least, median, most = found["waiting"]
    assert 0 <= least <= median <= most < 1
    json.dumps(found)
    lines = format_summary(found).splitlines()
    assert len(lines) == 1 + len(kinds) + 2
    assert lines[1].split()[:3] == ["embed", "1", str(kinds["embed"]["tiles"])]


def test_waiting_is_what_the_summary_says_it_is():
    found = summary(played("all", 5, waits=False))
    assert found["waiting"] == [0, 0, 0]
    assert all(each["wait_us"] == 0 for each in found["kinds"].values())


@pytest.mark.parametrize(("depth", "programs"), [("all", 1), ("half", 50), ("all", 264)])
def test_perfetto_gets_a_track_for_each_program_of_a_multiprocessor(depth, programs):
    timeline = played(depth, programs)
    found = json.loads(json.dumps(perfetto(timeline, "a forward")))
    events = found["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {event["ph"] for event in events} == {"M", "X"}
    assert {event["tid"] for event in spans} <= set(named)
    assert named[0] == "critical path"
    assert len(named) == len(set(named.values()))
    assert len(named) == 1 + len({span.program for span in timeline.spans})
    assert ("multiprocessor 0, 2" in named.values()) == (programs > MULTIPROCESSORS)
    works = [e for e in spans if e["cat"].startswith("work") and e["tid"]]
    assert len(works) == timeline.tiles.tiles
    assert len({(e["name"]) for e in works}) == len(works)
    assert "layer 1 gate_up 0,0" in {e["name"] for e in works}
    for track in named:
        of = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == track)
        assert of
        assert of[0][0] >= 0
        assert all(b[0] >= a[1] - 1e-6 for a, b in pairwise(of)), named[track]
