"""The timeline of a forward's tiles: its critical path, and a file that Perfetto opens.

Times are nanoseconds of the device's clock, which is one for all multiprocessors and goes on in
steps of some ten nanoseconds.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from onelaunch.plan import Launch, TilePlan
from onelaunch.plan.tiles import Tile


class Span(NamedTuple):
    """A tile's times: when it began, when its inputs were ready, when its end was published."""

    tile: Tile
    launch: int
    program: int
    multiprocessor: int
    began: int
    ready: int
    ended: int


class Step(NamedTuple):
    """A tile of the critical path. `after` is what it could not begin before: "wait", the last tile
    that it waited for; "turn", the tile before it of the same program; "launch", the last tile of
    the launch before; "start", nothing. `gap`: nanoseconds from there until it was ready."""

    span: Span
    after: str
    gap: int


@dataclass(frozen=True)
class Timeline:
    """A forward's tiles, in the order of their numbers."""

    tiles: TilePlan
    launches: tuple[Launch, ...]
    spans: tuple[Span, ...]

    @property
    def began(self) -> int:
        return min(span.began for span in self.spans)

    @property
    def ended(self) -> int:
        return max(span.ended for span in self.spans)

    def kind(self, span: Span) -> str:
        return self.tiles.plan.stages[span.tile.phase].kind

    @cached_property
    def path(self) -> tuple[Step, ...]:
        """The tiles, in order, whose work and gaps add up to the time of the whole: from the last
        one to end back to what each could not begin before."""
        turns = _turns(self.spans)
        last_of_launch = _latest((each.launch, each) for each in self.spans)
        last_of_rows = _latest((each.tile[:2], each) for each in self.spans)
        steps: list[Step] = []
        span: Span | None = _last(self.spans)
        while span is not None:
            awaited = _last(
                last_of_rows[wait.phase, row_tile]
                for wait in self.tiles.waits(span.tile, self.launches[span.launch])
                for row_tile in range(wait.first, wait.last + 1)
            )
            before: Span | None = None
            if awaited is not None and awaited.ended > span.began:
                after, before = "wait", awaited
            elif span.tile in turns:
                after, before = "turn", turns[span.tile]
            elif span.launch > 0:
                after, before = "launch", last_of_launch[span.launch - 1]
            else:
                after = "start"
            since = span.began if before is None else before.ended
            steps.append(Step(span, after, span.ready - since))
            span = before
        return tuple(reversed(steps))


def summary(timeline: Timeline) -> dict[str, Any]:
    """Summarize a timeline, in microseconds: the whole; of each kind of stage its tiles, their
    median wait and work, the median time from a stage's first tile to its last one's end, and what
    it has of the critical path; the programs' shares of waiting, least, median and most; the path's
    gaps, by their cause."""
    spans, path = timeline.spans, timeline.path
    kinds: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        kinds[timeline.kind(span)].append(span)
    waited: Counter[int] = Counter()
    for span in spans:
        waited[span.program] += span.ready - span.began
    total = timeline.ended - timeline.began
    shares = sorted(round(wait / total, 4) for wait in waited.values())
    return {
        "us": total / 1e3,
        "programs": len(waited),
        "kinds": {kind: _of_kind(kind, each, timeline) for kind, each in kinds.items()},
        "waiting": [shares[0], statistics.median(shares), shares[-1]],
        "path": {
            "tiles": len(path),
            "work_us": sum(step.span.ended - step.span.ready for step in path) / 1e3,
            "gaps": {
                after: {"n": len(gaps), "us": sum(gaps) / 1e3}
                for after in dict.fromkeys(step.after for step in path)
                if (gaps := [step.gap for step in path if step.after == after])
            },
        },
    }


def _of_kind(kind: str, spans: Sequence[Span], timeline: Timeline) -> dict[str, Any]:
    stages: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        stages[span.tile.phase].append(span)
    whole = [max(s.ended for s in each) - min(s.began for s in each) for each in stages.values()]
    steps = [step for step in timeline.path if timeline.kind(step.span) == kind]
    return {
        "stages": len(stages),
        "tiles": len(spans),
        "wait_us": statistics.median(span.ready - span.began for span in spans) / 1e3,
        "work_us": statistics.median(span.ended - span.ready for span in spans) / 1e3,
        "stage_us": statistics.median(whole) / 1e3,
        "path_tiles": len(steps),
        "path_work_us": sum(step.span.ended - step.span.ready for step in steps) / 1e3,
        "path_gap_us": sum(step.gap for step in steps) / 1e3,
    }


def format_summary(figures: dict[str, Any]) -> str:
    """A figures as lines of text."""
    head = f"{'us':<10}{'stages':>7}{'tiles':>7}{'wait':>8}{'work':>8}{'stage':>8}"
    lines = [head + f"{'path: work':>13}{'gap':>8}"]
    for kind, each in figures["kinds"].items():
        lines.append(
            f"{kind:<10}{each['stages']:>7}{each['tiles']:>7}{each['wait_us']:>8.2f}"
            f"{each['work_us']:>8.2f}{each['stage_us']:>8.2f}{each['path_work_us']:>13.2f}"
            f"{each['path_gap_us']:>8.2f}"
        )
    path = figures["path"]
    gaps = ", ".join(f"{gap['n']} {after} {gap['us']:.2f}" for after, gap in path["gaps"].items())
    lowest, median, highest = figures["waiting"]
    return "\n".join(
        [
            *lines,
            f"{figures['us']:.2f} us; path of {path['tiles']} tiles: work {path['work_us']:.2f}, "
            f"gaps: {gaps}",
            f"{figures['programs']} programs wait {lowest:.0%} to {highest:.0%} of the time, "
            f"median {median:.0%}",
        ]
    )


def perfetto(timeline: Timeline, name: str) -> dict[str, Any]:
    """The timeline as Chrome's trace events, which Perfetto reads: a track for each program that a
    multiprocessor has at once, and one for the critical path; of each tile a span of waiting and
    one of work."""
    start = timeline.began
    tracks = _tracks(timeline.spans)
    events = [named("process_name", 0, name), named("thread_name", 0, "critical path")]
    for number, (multiprocessor, lane) in enumerate(sorted(set(tracks.values())), 1):
        lane_name = f"multiprocessor {multiprocessor}" + (f", {lane + 1}" if lane else "")
        events.append(named("thread_name", number, lane_name))
        events.append(named("thread_sort_index", number, number))
    numbers = {track: i for i, track in enumerate(sorted(set(tracks.values())), 1)}
    for span in timeline.spans:
        track = numbers[tracks[span]]
        if span.ready > span.began:
            events.append(_event(timeline, span, "wait", track, span.began, span.ready, start))
        events.append(_event(timeline, span, "work", track, span.ready, span.ended, start))
    for step in timeline.path:
        ended, ready = step.span.ended, step.span.ready
        events.append(_event(timeline, step.span, "work", 0, ready, ended, start))
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _tracks(spans: Iterable[Span]) -> dict[Span, tuple[int, int]]:
    """Of each span its multiprocessor, and which of the programs there in its launch it is of."""
    there: dict[tuple[int, int], list[int]] = defaultdict(list)
    tracks = {}
    for span in sorted(spans, key=lambda span: (span.launch, span.program)):
        programs = there[span.launch, span.multiprocessor]
        if span.program not in programs:
            programs.append(span.program)
        tracks[span] = span.multiprocessor, programs.index(span.program)
    return tracks


def named(what: str, track: int, name: str | int) -> dict[str, Any]:
    """The event that names a process or a track."""
    value = {"sort_index": name} if what.endswith("sort_index") else {"name": name}
    return {"ph": "M", "name": what, "pid": 0, "tid": track, "args": value}


def _event(
    timeline: Timeline, span: Span, what: str, track: int, first: int, last: int, start: int
) -> dict[str, Any]:
    """A span of time, in microseconds since the start."""
    stage = timeline.tiles.plan.stages[span.tile.phase]
    tile = f"{stage.label} {span.tile.row_tile},{span.tile.column_tile}"
    return {
        "ph": "X",
        "name": tile if what == "work" else f"wait: {tile}",
        "cat": f"{what} {stage.kind}",
        "pid": 0,
        "tid": track,
        "ts": (first - start) / 1e3,
        "dur": (last - first) / 1e3,
        "args": {"program": span.program, "launch": timeline.launches[span.launch].name},
    }


def _turns(spans: Iterable[Span]) -> dict[Tile, Span]:
    """Before each tile the one that its program had before it in the same launch."""
    latest: dict[tuple[int, int], Span] = {}
    before = {}
    for span in sorted(spans, key=lambda span: span.began):
        program = span.launch, span.program
        if program in latest:
            before[span.tile] = latest[program]
        latest[program] = span
    return before


def _latest(pairs: Iterable[tuple[Any, Span]]) -> dict[Any, Span]:
    """The last span to end under each key."""
    latest: dict[Any, Span] = {}
    for key, span in pairs:
        if key not in latest or latest[key].ended < span.ended:
            latest[key] = span
    return latest


def _last(spans: Iterable[Span]) -> Span | None:
    return max(spans, key=lambda span: span.ended, default=None)
