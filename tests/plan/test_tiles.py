"""Tiles and waits, on a simulated machine: any number of CTAs, interleaved at random."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.plan import KINDS, PlanError, launches, make_plan, part_of
from onelaunch.plan.tiles import (
    Span,
    Tile,
    TilePlan,
    Tiling,
    Wait,
    check_tiles,
    columns_of,
    make_tiles,
    row_spans,
    rows_read,
)

TINY = ModelConfig(
    dim=24, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=8, hidden_dim=40, vocab_size=50,
    max_seq_len=64,
)  # fmt: skip
UNEVEN = {
    "embed": Tiling(3, 24), "qkv": Tiling(4, 8), "attention": Tiling(5, 1),
    "out_proj": Tiling(2, 16), "gate_up": Tiling(6, 16), "down": Tiling(4, 24),
    "head": Tiling(7, 20), "sample": Tiling(1, 1),
}  # fmt: skip


def tiled(batch=2, sequence=11, tilings=UNEVEN, **options) -> TilePlan:
    return make_tiles(make_plan(TINY, batch, sequence, **options), tilings)


def part_tiled(part, batch=2, sequence=11, tilings=UNEVEN) -> TilePlan:
    return make_tiles(part_of(make_plan(TINY, batch, sequence), part), tilings)


class Machine:
    """A simulated GPU: CTAs walk the tiles of a launch, one step of one CTA at a time.

    Every element of a buffer is the number of the stage that wrote it last; a tile that reads
    another number ran too early or too late."""

    def __init__(self, tiles: TilePlan, seed: int) -> None:
        self.tiles, self.random = tiles, random.Random(seed)
        self.written: dict[tuple[str, int, int], int] = {}  # buffer, row, column tile's phase
        self.ended: dict[tuple[int, int], int] = {}

    def run(self, launch, ctas: int) -> int:
        """Run all tiles of a launch; returns how many."""
        walks = {p: list(self.tiles.walk(launch, p, ctas)) for p in range(ctas)}
        at = dict.fromkeys(walks, 0)
        begun: dict[int, Tile] = {}
        done = 0
        while any(at[p] < len(walks[p]) for p in walks):
            ready = [
                p for p in walks if at[p] < len(walks[p]) and self.is_ready(walks, at, p, launch)
            ]
            ready = sorted({*ready, *begun})
            assert ready, "deadlock"
            cta = self.random.choice(ready)
            tile = walks[cta][at[cta]]
            if cta in begun:
                self.write(begun.pop(cta))
                at[cta] += 1
                done += 1
            else:
                self.read(tile)
                begun[cta] = tile
        return done

    def is_ready(self, walks, at, cta, launch) -> bool:
        waits = self.tiles.waits(walks[cta][at[cta]], launch)
        return all(
            self.ended.get((w.phase, i), 0) == self.tiles.phases[w.phase].column_tiles
            for w in waits
            for i in range(w.first, w.last + 1)
        )

    def read(self, tile: Tile) -> None:
        plan, phase = self.tiles.plan, self.tiles.phases[tile.phase]
        stage, span = plan.stages[tile.phase], phase.spans[tile.row_tile]
        for name, version, _ in stage.reads:
            writer = next(
                (
                    i
                    for i, s in enumerate(plan.stages)
                    for w in s.writes
                    if w[:2] == (name, version)
                ),
                None,
            )
            if writer is None:
                continue
            # In place, a tile reads only the columns that it will overwrite.
            in_place = any(name == w.buffer for w in stage.writes)
            columns = range(self.tiles.phases[writer].column_tiles)
            if in_place:
                same = len(columns) == phase.column_tiles
                columns = [tile.column_tile] if same else []
            for rows in rows_read(plan, stage, name, span):
                for row in range(*rows):
                    for column in columns:
                        actual = self.written.get((name, row, column))
                        assert actual == writer, f"{stage.label} row {row} of {name}: {actual}"

    def write(self, tile: Tile) -> None:
        phase = self.tiles.phases[tile.phase]
        for access in self.tiles.plan.stages[tile.phase].writes:
            for row in range(*phase.spans[tile.row_tile]):
                self.written[access.buffer, row, tile.column_tile] = tile.phase
        key = tile.phase, tile.row_tile
        self.ended[key] = self.ended.get(key, 0) + 1


def run_all(tiles: TilePlan, depth, ctas: int, seed: int) -> None:
    machine = Machine(tiles, seed)
    done = sum(machine.run(launch, ctas) for launch in launches(tiles.plan, depth))
    assert done == tiles.tiles
    for number, phase in enumerate(tiles.phases):
        for row_tile in range(len(phase.spans)):
            assert machine.ended[number, row_tile] == phase.column_tiles


@pytest.mark.parametrize("depth", ["stage", "half", 1, 2, "all"])
@pytest.mark.parametrize("ctas", [1, 2, 7, 132])
def test_any_number_of_programs_at_any_depth(depth, ctas):
    for all_positions in (False, True):
        tiles = tiled(all_positions=all_positions, sample=True)
        check_tiles(tiles)
        for seed in range(3):
            run_all(tiles, depth, ctas, seed)


@given(
    batch=st.integers(1, 4),
    sequence=st.integers(1, 20),
    all_positions=st.booleans(),
    sizes=st.lists(st.tuples(st.integers(1, 33), st.integers(1, 64)), min_size=8, max_size=8),
    ctas=st.integers(1, 40),
    depth=st.sampled_from(["stage", "half", 1, "all"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_any_tiling(batch, sequence, all_positions, sizes, ctas, depth, seed):
    tilings = {kind: Tiling(*size) for kind, size in zip(KINDS, sizes, strict=True)}
    tiles = tiled(batch, sequence, tilings, all_positions=all_positions, sample=True)
    check_tiles(tiles)
    run_all(tiles, depth, ctas, seed)


def test_the_numbers_of_tiles():
    tiles = tiled(1, 16, dict.fromkeys(KINDS, Tiling(4, 8)), all_positions=True)
    for phase, stage in zip(tiles.phases, tiles.plan.stages, strict=True):
        assert phase.tiles == 4 * -(-columns_of(TINY, stage.kind) // 8)
    numbers = [tiles.tile(i) for i in range(tiles.tiles)]
    head = len(tiles.phases) - 1 - (tiles.plan.stages[-1].kind == "sample")
    by_columns = sorted(numbers, key=lambda t: (t[0], t[2], t[1]) if t[0] == head else t)
    assert numbers == by_columns
    assert len(set(numbers)) == tiles.tiles
    assert numbers[0] == (0, 0, 0)
    launch = launches(tiles.plan, "all")[0]
    walked = [tile for p in range(5) for tile in tiles.walk(launch, p, 5)]
    assert sorted(walked) == sorted(numbers)


def test_waits_are_by_row_tile_and_no_more_than_needed():
    """With equal row tiles a product waits for its own row tile of the stage before, attention for
    the rows of its sequence up to its own; implied waits are left out."""
    tiles = tiled(2, 16, dict.fromkeys(KINDS, Tiling(8, 8)), all_positions=True)
    for number, (phase, stage) in enumerate(zip(tiles.phases, tiles.plan.stages, strict=True)):
        for row_tile, waits in enumerate(phase.waits):
            if stage.kind == "embed":
                assert waits == ()
            elif stage.kind == "attention":
                assert waits == (Wait(number - 1, row_tile // 2 * 2, row_tile),)
            else:
                assert waits == (Wait(number - 1, row_tile, row_tile),)


def test_logits_of_the_last_position_wait_for_its_rows_alone():
    tiles = tiled(2, 16, dict.fromkeys(KINDS, Tiling(8, 8)))
    head = tiles.phases[-1]
    assert head.spans == (Span(0, 2),)
    down = len(tiles.phases) - 2
    assert head.waits == ((Wait(down, 1, 1), Wait(down, 3, 3)),)


def test_attention_stays_within_a_sequence():
    plan = make_plan(TINY, 3, 10)
    stage = next(stage for stage in plan.stages if stage.kind == "attention")
    assert row_spans(plan, stage, 4) == tuple(
        Span(10 * b + first, 10 * b + last)
        for b in range(3)
        for first, last in ((0, 4), (4, 8), (8, 10))
    )


def mutants(tiles: TilePlan):
    """The plan with one wait less, one too late, or one row tile other than it was."""
    for number, phase in enumerate(tiles.phases):
        for row_tile, waits in enumerate(phase.waits):
            for i, wait in enumerate(waits):
                changed = [(*waits[:i], *waits[i + 1 :])]
                if wait.first < wait.last:
                    changed.append((*waits[:i], wait._replace(last=wait.last - 1), *waits[i + 1 :]))
                    changed.append(
                        (*waits[:i], wait._replace(first=wait.first + 1), *waits[i + 1 :])
                    )
                changed.append((*waits[:i], wait._replace(phase=number), *waits[i + 1 :]))
                for new in changed:
                    of_phase = (*phase.waits[:row_tile], new, *phase.waits[row_tile + 1 :])
                    phases = list(tiles.phases)
                    phases[number] = replace(phase, waits=of_phase)
                    yield replace(tiles, phases=tuple(phases))


def test_every_wait_is_needed_and_a_missing_one_is_caught():
    tiles = tiled(2, 7, sample=True)
    check_tiles(tiles)
    n_mutants = 0
    for mutant in mutants(tiles):
        with pytest.raises(PlanError):
            check_tiles(mutant)
        n_mutants += 1
    assert n_mutants > 100


def test_row_tiles_that_miss_a_row_are_caught():
    tiles = tiled(1, 8)
    phase = tiles.phases[1]
    for spans in (phase.spans[:-1], (Span(0, 4), Span(3, 8)), (Span(0, 4), Span(4, 9))):
        wrong = replace(phase, spans=spans, waits=phase.waits[: len(spans)])
        with pytest.raises(PlanError, match="every row once"):
            check_tiles(replace(tiles, phases=(tiles.phases[0], wrong, *tiles.phases[2:])))


def test_what_cannot_be_tiled_is_refused():
    with pytest.raises(BadInput, match="past 3: .* without cached"):
        make_tiles(make_plan(TINY, 1, 4, 3), UNEVEN)
    with pytest.raises(BadInput, match="tiling of qkv: None"):
        make_tiles(make_plan(TINY, 1, 4), {k: t for k, t in UNEVEN.items() if k != "qkv"})
    with pytest.raises(BadInput, match="tiling of down"):
        make_tiles(make_plan(TINY, 1, 4), UNEVEN | {"down": Tiling(0, 8)})
