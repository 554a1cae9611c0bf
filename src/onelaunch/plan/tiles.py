"""Cut the stages of a plan into tiles, and find the dependencies between tiles.

A phase is a stage cut into tiles: row tiles, of some positions each, times column tiles. The tiles
of a launch are numbered phase by phase, within a phase row tile by row tile (in head column tile by
column tile). With P CTAs, CTA p runs tiles p, p + P, p + 2 P, ... A tile starts when the row tiles
that it waits for are complete in all columns; each row tile of a phase has one counter. As a tile
waits for earlier phases only, the first incomplete tile can always run, so no number of CTAs
deadlocks, not even one.

Rows count positions through the batch: sequence b, position s is row b * sequence + s.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.plan.check import PlanError
from onelaunch.plan.kinds import STAGE_KINDS, is_cache
from onelaunch.plan.launches import Launch
from onelaunch.plan.stages import Plan, Stage


class Tiling(NamedTuple):
    """The size of a tile: rows (positions) and output columns (heads in attention)."""

    rows: int
    columns: int


class Span(NamedTuple):
    """The rows `first` to `last`, `last` excluded."""

    first: int
    last: int


class Wait(NamedTuple):
    """A dependency on all columns of row tiles `first` to `last` of a phase, both included."""

    phase: int
    first: int
    last: int


class Tile(NamedTuple):
    """The position of a tile: phase, row tile, column tile."""

    phase: int
    row_tile: int
    column_tile: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A stage cut into tiles. `first` is the number of its first tile; for each row tile, `spans`
    has its rows and `waits` its dependencies, as if all stages were one launch."""

    stage: int
    first: int
    spans: tuple[Span, ...]
    column_tiles: int
    waits: tuple[tuple[Wait, ...], ...]

    @property
    def tiles(self) -> int:
        return len(self.spans) * self.column_tiles


@dataclass(frozen=True)
class TilePlan:
    """The phases of a plan: one per stage, in the order of the plan."""

    plan: Plan
    tilings: Mapping[str, Tiling]
    phases: tuple[Phase, ...]

    @property
    def tiles(self) -> int:
        return self.phases[-1].first + self.phases[-1].tiles

    def tile(self, number: int) -> Tile:
        """Return the tile of a number; numbers run through all phases."""
        phase = bisect_right(self._firsts, number) - 1
        within = number - self.phases[phase].first
        if self.plan.stages[phase].kind == "head":
            return Tile(phase, *reversed(divmod(within, len(self.phases[phase].spans))))
        return Tile(phase, *divmod(within, self.phases[phase].column_tiles))

    def waits(self, tile: Tile, launch: Launch | None = None) -> tuple[Wait, ...]:
        """Return the dependencies of a tile; with `launch`, the one that holds the tile, only those
        within it, as earlier launches have ended."""
        first = 0 if launch is None else launch.first
        return tuple(w for w in self.phases[tile.phase].waits[tile.row_tile] if w.phase >= first)

    def walk(self, launch: Launch, cta: int, n_ctas: int) -> Iterator[Tile]:
        """Yield the tiles that one CTA of a launch runs, in its order."""
        last = self.phases[launch.last - 1]
        first = self.phases[launch.first].first
        for number in range(first + cta, last.first + last.tiles, n_ctas):
            yield self.tile(number)

    @cached_property
    def _firsts(self) -> list[int]:
        return [phase.first for phase in self.phases]


def columns_of(config: ModelConfig, kind: str) -> int:
    """Return the columns, as `Tiling` counts them, that a kind of stage writes per row."""
    return STAGE_KINDS[kind].columns(config)


def make_tiles(plan: Plan, tilings: Mapping[str, Tiling]) -> TilePlan:
    """Cut every stage into the tiles of its kind, and find the dependencies of each tile.

    A wait that another one implies is left out. Raises BadInput if a kind has no tiling or an empty
    one, or if the plan has cached positions.
    """
    if plan.past:
        raise BadInput(f"past {plan.past}: tiles need a forward without cached positions")
    for kind in dict.fromkeys(stage.kind for stage in plan.stages):
        if kind not in tilings or min(tilings[kind]) < 1:
            raise BadInput(
                f"tiling of {kind}: {tilings.get(kind)} must be rows and columns of at least 1"
            )
    phases: list[Phase] = []
    # per row tile, a bit mask of the row tiles that are complete when it starts
    complete_before: list[list[int]] = []
    offsets: list[int] = []  # the first bit of each phase
    writers: dict[tuple[str, int], int] = {}
    first = bits = 0
    for number, stage in enumerate(plan.stages):
        spans = row_spans(plan, stage, tilings[stage.kind].rows)
        waits: list[tuple[Wait, ...]] = []
        masks: list[int] = []
        for span in spans:
            needed: set[tuple[int, int]] = set()
            for access in stage.reads:
                writer = writers.get((access.buffer, access.version))
                if writer is not None:
                    rows = rows_read(plan, stage, access.buffer, span)
                    needed |= {
                        (writer, i) for r in rows for i in _overlapping(phases[writer].spans, r)
                    }
            direct, mask = [], 0
            for phase, row_tile in sorted(needed, reverse=True):
                bit = 1 << (offsets[phase] + row_tile)
                if not mask & bit:
                    direct.append((phase, row_tile))
                    mask |= bit | complete_before[phase][row_tile]
            waits.append(_as_ranges(direct))
            masks.append(mask)
        _, column_tiles = counts(plan, stage, tilings[stage.kind])
        phases.append(Phase(number, first, spans, column_tiles, tuple(waits)))
        first += phases[-1].tiles
        complete_before.append(masks)
        offsets.append(bits)
        bits += len(spans)
        writers |= {(access.buffer, access.version): number for access in stage.writes}
    return TilePlan(plan, dict(tilings), tuple(phases))


def counts(plan: Plan, stage: Stage, tiling: Tiling) -> tuple[int, int]:
    """Return the numbers of row tiles and column tiles of a stage."""
    columns = -(-columns_of(plan.config, stage.kind) // tiling.columns)
    if stage.kind == "attention":
        return plan.batch * -(-plan.sequence // tiling.rows), columns
    return -(-_rows_of(plan, stage) // tiling.rows), columns


def row_spans(plan: Plan, stage: Stage, rows: int) -> tuple[Span, ...]:
    """Return the row tiles of a stage. Those of attention stay within one sequence; head has a row
    per position with logits, sample one per sequence."""
    if stage.kind == "attention":
        return tuple(
            Span(start + span.first, start + span.last)
            for start in range(0, plan.batch * plan.sequence, plan.sequence)
            for span in _cut(plan.sequence, rows)
        )
    return _cut(_rows_of(plan, stage), rows)


def rows_read(plan: Plan, stage: Stage, buffer: str, span: Span) -> tuple[Span, ...]:
    """Return the rows of a buffer that a row tile reads."""
    if stage.kind == "attention" and is_cache(buffer):
        start = span.first // plan.sequence * plan.sequence
        return (Span(start, span.last),)  # its sequence, up to its last row
    if stage.kind == "head" and plan.buffer("logits").shape[1] == 1:
        ends = range(span.first + 1, span.last + 1)
        return tuple(Span(end * plan.sequence - 1, end * plan.sequence) for end in ends)
    if stage.kind == "sample":
        positions = plan.buffer("logits").shape[1]
        ends = range(span.first + 1, span.last + 1)
        return tuple(Span(end * positions - 1, end * positions) for end in ends)
    return (span,)


def check_tiles(tiles: TilePlan) -> None:
    """Raise PlanError unless any number of CTAs can run the tiles without deadlock or data race.

    Every tile waits for earlier phases only; the row tiles of a phase hold its rows once, in order;
    what a tile reads is written when it starts; what it overwrites has been read by every reader,
    except those of its own row tile.
    """
    plan, phases = tiles.plan, tiles.phases
    for phase, stage in zip(phases, plan.stages, strict=True):
        rows = [row for row, _ in row_spans(plan, stage, 1)]
        if [row for span in phase.spans for row in range(*span)] != rows:
            raise PlanError(f"{stage.label}: the row tiles do not hold every row once, in order")
    complete, offsets = _complete_before(tiles), _offsets(tiles)
    segments = _Segments(tiles)
    # per (buffer, segment): the row tile that wrote it last, and those that have read it since
    writers: dict[tuple[str, int], tuple[int, int]] = {}
    readers: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for number, (phase, stage) in enumerate(zip(phases, plan.stages, strict=True)):
        for row_tile, span in enumerate(phase.spans):
            for access in stage.reads:
                for needed in rows_read(plan, stage, access.buffer, span):
                    for segment in segments.of(needed):
                        region = access.buffer, segment
                        readers.setdefault(region, []).append((number, row_tile))
                        if region in writers and not _is_complete(
                            complete[number][row_tile], offsets, writers[region]
                        ):
                            raise PlanError(
                                f"{_rows(stage, span)} reads {access.buffer} without waiting for "
                                f"{plan.stages[writers[region][0]].label}"
                            )
        for row_tile, span in enumerate(phase.spans):
            for access in stage.writes:
                for segment in segments.of(span):
                    region = access.buffer, segment
                    for reader in readers.pop(region, ()):
                        if reader != (number, row_tile) and not _is_complete(
                            complete[number][row_tile], offsets, reader
                        ):
                            raise PlanError(
                                f"{_rows(stage, span)} overwrites {access.buffer} without waiting "
                                f"for {plan.stages[reader[0]].label}, which reads it"
                            )
                    writers[region] = number, row_tile


class _Segments:
    """Numbered runs of rows that no span of a plan divides."""

    def __init__(self, tiles: TilePlan) -> None:
        spans = {span for phase in tiles.phases for span in phase.spans}
        for phase, stage in zip(tiles.phases, tiles.plan.stages, strict=True):
            for access in stage.reads:
                for span in phase.spans:
                    spans.update(rows_read(tiles.plan, stage, access.buffer, span))
        self.cuts = sorted({row for span in spans for row in span})

    def of(self, span: Span) -> range:
        return range(bisect_left(self.cuts, span.first), bisect_left(self.cuts, span.last))


def _is_complete(mask: int, offsets: Sequence[int], row_tile: tuple[int, int]) -> bool:
    """Return whether the bit of a (phase, row tile) is set."""
    phase, number = row_tile
    return bool(mask >> (offsets[phase] + number) & 1)


def _rows(stage: Stage, span: Span) -> str:
    return f"{stage.label}, rows {span.first} to {span.last - 1},"


def _complete_before(tiles: TilePlan) -> list[list[int]]:
    """Return, per row tile, a bit mask of the row tiles that are complete when it starts."""
    offsets = _offsets(tiles)
    complete: list[list[int]] = []
    for number, phase in enumerate(tiles.phases):
        masks: list[int] = []
        for row_tile, waits in enumerate(phase.waits):
            mask = 0
            for wait in waits:
                if not 0 <= wait.phase < number:
                    raise PlanError(
                        f"{tiles.plan.stages[number].label}, row tile {row_tile} waits for phase "
                        f"{wait.phase}, which is not before its own phase, {number}"
                    )
                if not 0 <= wait.first <= wait.last < len(tiles.phases[wait.phase].spans):
                    raise PlanError(
                        f"{tiles.plan.stages[number].label}, row tile {row_tile} waits for row "
                        f"tiles {wait.first} to {wait.last} of phase {wait.phase}, which has "
                        f"{len(tiles.phases[wait.phase].spans)}"
                    )
                for other in range(wait.first, wait.last + 1):
                    mask |= 1 << (offsets[wait.phase] + other) | complete[wait.phase][other]
            masks.append(mask)
        complete.append(masks)
    return complete


def _offsets(tiles: TilePlan) -> list[int]:
    offsets, total = [], 0
    for phase in tiles.phases:
        offsets.append(total)
        total += len(phase.spans)
    return offsets


def _rows_of(plan: Plan, stage: Stage) -> int:
    if stage.kind == "head":
        return plan.batch * plan.buffer("logits").shape[1]
    return plan.batch * (1 if stage.kind == "sample" else plan.sequence)


def _cut(total: int, rows: int) -> tuple[Span, ...]:
    return tuple(Span(first, min(first + rows, total)) for first in range(0, total, rows))


def _overlapping(spans: Sequence[Span], rows: Span) -> range:
    """Return the indices of the spans, which are sorted, that share a row with `rows`."""
    first = bisect_right(spans, rows.first, key=lambda span: span.last)
    last = bisect_left(spans, rows.last, key=lambda span: span.first)
    return range(first, last)


def _as_ranges(row_tiles: Sequence[tuple[int, int]]) -> tuple[Wait, ...]:
    """Merge (phase, row tile) pairs into waits for ranges of row tiles."""
    waits: list[Wait] = []
    for phase, row_tile in sorted(row_tiles):
        if waits and waits[-1].phase == phase and waits[-1].last == row_tile - 1:
            waits[-1] = waits[-1]._replace(last=row_tile)
        else:
            waits.append(Wait(phase, row_tile, row_tile))
    return tuple(waits)
