"""Parts of a plan: one block of every layer, its stages a chain of their own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelaunch.plan import KINDS, PlanError, check, launches, make_plan, part_of
from onelaunch.plan.tiles import Tiling, check_tiles
from tests.plan.plans import CONFIGS, TINY, tiny_plans
from tests.plan.test_tiles import mutants, part_tiled, run_all

OF_LAYER = {"ffn": ["gate_up", "down"], "attention": ["qkv", "attention", "out_proj"]}


@pytest.mark.parametrize("part", OF_LAYER)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_is_embed_and_a_block_of_every_layer(name, part):
    config = CONFIGS[name]
    plan = part_of(make_plan(config, 2, 4, sample=True), part)
    assert [s.kind for s in plan.stages] == ["embed", *OF_LAYER[part] * config.n_layers]
    assert [s.layer for s in plan.stages[1 :: len(OF_LAYER[part])]] == list(range(config.n_layers))
    assert len(launches(plan, 1)) == 1 + config.n_layers
    with pytest.raises(PlanError):
        check(plan)


@pytest.mark.parametrize("part", OF_LAYER)
def test_a_stage_reads_what_the_stages_before_it_have_left(part):
    written = {"tokens": 0} | {f"cache.{layer}": 0 for layer in range(TINY.n_layers)}
    for stage in part_of(make_plan(TINY, 1, 5), part).stages:
        for access in stage.reads:
            assert access.version == written[access.buffer]
        for access in stage.writes:
            written[access.buffer] = written.get(access.buffer, 0) + 1
            assert access.version == written[access.buffer]
    assert written["x"] == 1 + TINY.n_layers


def test_the_whole_is_the_plan_itself():
    for plan in tiny_plans().values():
        assert part_of(plan, "whole") is plan


@given(
    part=st.sampled_from(sorted(OF_LAYER)),
    batch=st.integers(1, 3),
    sequence=st.integers(1, 20),
    sizes=st.lists(st.tuples(st.integers(1, 33), st.integers(1, 64)), min_size=8, max_size=8),
    ctas=st.integers(1, 40),
    depth=st.sampled_from(["stage", "half", 1, 2, "all"]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_any_tiling(part, batch, sequence, sizes, ctas, depth, seed):
    tilings = {kind: Tiling(*size) for kind, size in zip(KINDS, sizes, strict=True)}
    tiles = part_tiled(part, batch, sequence, tilings)
    check_tiles(tiles)
    run_all(tiles, depth, ctas, seed)


@pytest.mark.parametrize("part", OF_LAYER)
def test_every_wait_is_needed(part):
    n_mutants = 0
    for mutant in mutants(part_tiled(part, 2, 7)):
        with pytest.raises(PlanError):
            check_tiles(mutant)
        n_mutants += 1
    assert n_mutants > 30
