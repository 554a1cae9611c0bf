"""The stages cut into tiles, and what each tile waits for.

A phase is a stage cut into tiles: row tiles, which hold some positions each, times column tiles.
The tiles of a launch stand in one order, phase after phase and in a phase row tile after row tile,
or, in head, column tile after column tile; of P programs, program p takes tiles p, p + P, p + 2 P,
... of it. A tile begins when the row tiles that it waits for have ended, all columns of them: one
counter for each row tile of a phase. As every tile waits for earlier phases only, the first tile
that has not ended can always go on, and no number of programs deadlocks, one included.

Positions are counted through the batch: sequence b, position s is row b * sequence + s.
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
    """A tile's size: rows (positions), and columns of what the stage writes, heads in attention."""

    rows: int
    columns: int


class Span(NamedTuple):
    """Rows from `first` up to, not including, `last`."""

    first: int
    last: int


class Wait(NamedTuple):
    """For all columns of the row tiles of a phase from `first` to `last`, both included."""

    phase: int
    first: int
    last: int


class Tile(NamedTuple):
    """Which tile: of which phase, row tile and column tile."""

    phase: int
    row_tile: int
    column_tile: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A stage cut into tiles. `first` is the number of its first tile, `spans` are the rows of each
    row tile, `waits` what each of them waits for, launches aside."""

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
    """A plan's stages as phases, one each, in the plan's order."""

    plan: Plan
    tilings: Mapping[str, Tiling]
    phases: tuple[Phase, ...]

    @property
    def tiles(self) -> int:
        return self.phases[-1].first + self.phases[-1].tiles

    def tile(self, number: int) -> Tile:
        """The tile of a number, counted through all phases."""
        phase = bisect_right(self._firsts, number) - 1
        within = number - self.phases[phase].first
        if self.plan.stages[phase].kind == "head":
            return Tile(phase, *reversed(divmod(within, len(self.phases[phase].spans))))
        return Tile(phase, *divmod(within, self.phases[phase].column_tiles))

    def waits(self, tile: Tile, launch: Launch | None = None) -> tuple[Wait, ...]:
        """What a tile waits for; of the launch that it is in alone, where that is given: earlier
        launches have ended."""
        first = 0 if launch is None else launch.first
        return tuple(w for w in self.phases[tile.phase].waits[tile.row_tile] if w.phase >= first)

    def walk(self, launch: Launch, program: int, programs: int) -> Iterator[Tile]:
        """The tiles of one of a launch's programs, in its order."""
        last = self.phases[launch.last - 1]
        first = self.phases[launch.first].first
        for number in range(first + program, last.first + last.tiles, programs):
            yield self.tile(number)

    @cached_property
    def _firsts(self) -> list[int]:
        return [phase.first for phase in self.phases]


def columns_of(config: ModelConfig, kind: str) -> int:
    """How many columns, as Tiling counts them, a kind of stage writes for each row."""
    return STAGE_KINDS[kind].columns(config)


def make_tiles(plan: Plan, tilings: Mapping[str, Tiling]) -> TilePlan:
    """Cut every stage as the tiling of its kind says, and find what each tile waits for.

    A wait is left out where another one implies it. Raises BadInput where a kind has no tiling or
    one of no size, or where there are cached positions: what is tiled has none.
    """
    if plan.past:
        raise BadInput(f"{plan.past} positions are cached; tiles are of a forward without any")
    for kind in dict.fromkeys(stage.kind for stage in plan.stages):
        if kind not in tilings or min(tilings[kind]) < 1:
            raise BadInput(f"tiles of {kind}: {tilings.get(kind)} is no number of rows and columns")
    phases: list[Phase] = []
    before: list[list[int]] = []  # of each row tile, a bit for each row tile that has ended
    offsets: list[int] = []  # of a phase's bits
    writers: dict[tuple[str, int], int] = {}
    first = bits = 0
    for number, stage in enumerate(plan.stages):
        spans = row_spans(plan, stage, tilings[stage.kind].rows)
        waits: list[tuple[Wait, ...]] = []
        ended: list[int] = []
        for span in spans:
            wanted: set[tuple[int, int]] = set()
            for access in stage.reads:
                writer = writers.get((access.buffer, access.version))
                if writer is not None:
                    rows = rows_read(plan, stage, access.buffer, span)
                    wanted |= {(writer, i) for r in rows for i in _meeting(phases[writer].spans, r)}
            found, known = [], 0
            for phase, row_tile in sorted(wanted, reverse=True):
                bit = 1 << (offsets[phase] + row_tile)
                if not known & bit:
                    found.append((phase, row_tile))
                    known |= bit | before[phase][row_tile]
            waits.append(_as_ranges(found))
            ended.append(known)
        _, column_tiles = counts(plan, stage, tilings[stage.kind])
        phases.append(Phase(number, first, spans, column_tiles, tuple(waits)))
        first += phases[-1].tiles
        before.append(ended)
        offsets.append(bits)
        bits += len(spans)
        writers |= {(access.buffer, access.version): number for access in stage.writes}
    return TilePlan(plan, dict(tilings), tuple(phases))


def counts(plan: Plan, stage: Stage, tiling: Tiling) -> tuple[int, int]:
    """How many row tiles and column tiles a stage is cut into."""
    columns = -(-columns_of(plan.config, stage.kind) // tiling.columns)
    if stage.kind == "attention":
        return plan.batch * -(-plan.sequence // tiling.rows), columns
    return -(-_rows_of(plan, stage) // tiling.rows), columns


def row_spans(plan: Plan, stage: Stage, rows: int) -> tuple[Span, ...]:
    """The row tiles of a stage. Attention's lie within one sequence; head has a row for each
    position that gets logits, sample one for each sequence."""
    if stage.kind == "attention":
        return tuple(
            Span(start + span.first, start + span.last)
            for start in range(0, plan.batch * plan.sequence, plan.sequence)
            for span in _cut(plan.sequence, rows)
        )
    return _cut(_rows_of(plan, stage), rows)


def rows_read(plan: Plan, stage: Stage, buffer: str, span: Span) -> tuple[Span, ...]:
    """The rows of a buffer that a row tile reads."""
    if stage.kind == "attention" and is_cache(buffer):
        start = span.first // plan.sequence * plan.sequence
        return (Span(start, span.last),)  # of its sequence, all up to its own
    if stage.kind == "head" and plan.buffer("logits").shape[1] == 1:
        ends = range(span.first + 1, span.last + 1)
        return tuple(Span(end * plan.sequence - 1, end * plan.sequence) for end in ends)
    if stage.kind == "sample":
        positions = plan.buffer("logits").shape[1]
        ends = range(span.first + 1, span.last + 1)
        return tuple(Span(end * positions - 1, end * positions) for end in ends)
    return (span,)


def check_tiles(tiles: TilePlan) -> None:
    """Raise PlanError unless any number of programs can run the tiles, and then compute the plan.

    Every tile waits for earlier phases only, so that nothing deadlocks; a phase's row tiles hold
    its rows once, in order; what a tile reads has been written when it begins; and what it writes
    over has been read by all who wanted it, its own row tile aside.
    """
    plan, phases = tiles.plan, tiles.phases
    for phase, stage in zip(phases, plan.stages, strict=True):
        rows = [row for row, _ in row_spans(plan, stage, 1)]
        if [row for span in phase.spans for row in range(*span)] != rows:
            raise PlanError(f"{stage.label}: its row tiles do not hold every row once, in order")
    ended, offsets = _ended(tiles), _offsets(tiles)
    pieces = _Pieces(tiles)
    writers: dict[tuple[str, int], tuple[int, int]] = {}  # of a piece of a buffer, the latest
    readers: dict[tuple[str, int], list[tuple[int, int]]] = {}  # since then
    for number, (phase, stage) in enumerate(zip(phases, plan.stages, strict=True)):
        for row_tile, span in enumerate(phase.spans):
            for access in stage.reads:
                for needed in rows_read(plan, stage, access.buffer, span):
                    for piece in pieces.of(needed):
                        place = access.buffer, piece
                        readers.setdefault(place, []).append((number, row_tile))
                        if place in writers and not _among(
                            ended[number][row_tile], offsets, writers[place]
                        ):
                            raise PlanError(
                                f"{_rows(stage, span)} reads {access.buffer} without waiting for "
                                f"{plan.stages[writers[place][0]].label}"
                            )
        for row_tile, span in enumerate(phase.spans):
            for access in stage.writes:
                for piece in pieces.of(span):
                    place = access.buffer, piece
                    for reader in readers.pop(place, ()):
                        if reader != (number, row_tile) and not _among(
                            ended[number][row_tile], offsets, reader
                        ):
                            raise PlanError(
                                f"{_rows(stage, span)} writes over {access.buffer} without waiting "
                                f"for {plan.stages[reader[0]].label}, which reads it"
                            )
                    writers[place] = number, row_tile


class _Pieces:
    """Rows that every span of a plan holds or leaves together, numbered."""

    def __init__(self, tiles: TilePlan) -> None:
        spans = {span for phase in tiles.phases for span in phase.spans}
        for phase, stage in zip(tiles.phases, tiles.plan.stages, strict=True):
            for access in stage.reads:
                for span in phase.spans:
                    spans.update(rows_read(tiles.plan, stage, access.buffer, span))
        self.cuts = sorted({row for span in spans for row in span})

    def of(self, span: Span) -> range:
        return range(bisect_left(self.cuts, span.first), bisect_left(self.cuts, span.last))


def _among(ended: int, offsets: Sequence[int], row_tile: tuple[int, int]) -> bool:
    """Whether the row tile of a phase is among those that have ended."""
    phase, number = row_tile
    return bool(ended >> (offsets[phase] + number) & 1)


def _rows(stage: Stage, span: Span) -> str:
    return f"{stage.label}, rows {span.first} to {span.last - 1},"


def _ended(tiles: TilePlan) -> list[list[int]]:
    """Of each row tile, a bit for each row tile that has surely ended when it begins."""
    offsets = _offsets(tiles)
    ended: list[list[int]] = []
    for number, phase in enumerate(tiles.phases):
        of_phase: list[int] = []
        for row_tile, waits in enumerate(phase.waits):
            known = 0
            for wait in waits:
                if not 0 <= wait.phase < number:
                    raise PlanError(
                        f"{tiles.plan.stages[number].label}, row tile {row_tile} waits for phase "
                        f"{wait.phase}, which is not before its own, {number}"
                    )
                if not 0 <= wait.first <= wait.last < len(tiles.phases[wait.phase].spans):
                    raise PlanError(
                        f"{tiles.plan.stages[number].label}, row tile {row_tile} waits for row "
                        f"tiles {wait.first} to {wait.last} of phase {wait.phase}, which has "
                        f"{len(tiles.phases[wait.phase].spans)}"
                    )
                for other in range(wait.first, wait.last + 1):
                    known |= 1 << (offsets[wait.phase] + other) | ended[wait.phase][other]
            of_phase.append(known)
        ended.append(of_phase)
    return ended


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


def _meeting(spans: Sequence[Span], rows: Span) -> range:
    """The indices of the spans, which lie in order, that share a row with `rows`."""
    first = bisect_right(spans, rows.first, key=lambda span: span.last)
    last = bisect_left(spans, rows.last, key=lambda span: span.first)
    return range(first, last)


def _as_ranges(wanted: Sequence[tuple[int, int]]) -> tuple[Wait, ...]:
    """Waits for (phase, row tile) pairs, neighbours in one."""
    found: list[Wait] = []
    for phase, row_tile in sorted(wanted):
        if found and found[-1].phase == phase and found[-1].last == row_tile - 1:
            found[-1] = found[-1]._replace(last=row_tile)
        else:
            found.append(Wait(phase, row_tile, row_tile))
    return tuple(found)
