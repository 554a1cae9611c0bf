"""The table of kinds against a model's own list of weights, and against itself."""

from __future__ import annotations

from collections import Counter

import pytest

from onelaunch.plan.kinds import (
    ATTENTION_BLOCK,
    FFN_BLOCK,
    KINDS,
    LAYER_KINDS,
    NO_LAYER,
    STAGE_KINDS,
    buffers_of,
    weights_of,
)
from tests.engines.suite import SHAPES


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_weight_is_of_one_stage_tied_embeddings_of_two(config):
    readers: Counter[str] = Counter()
    for kind in KINDS:
        layers = range(config.n_layers) if kind in LAYER_KINDS else (NO_LAYER,)
        for layer in layers:
            readers.update(weights_of(config, kind, layer))
    assert set(readers) == set(config.weight_shapes())
    twice = {name for name, times in readers.items() if times > 1}
    assert twice == ({"embed_tokens.weight"} if config.tied_embeddings else set())


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_product_has_the_extents_of_its_weights(config):
    shapes = config.weight_shapes()
    for name, kind in STAGE_KINDS.items():
        layer = 0 if kind.block else NO_LAYER
        matrices = [shapes[w] for w in weights_of(config, name, layer) if len(shapes[w]) == 2]
        if kind.inner is None:
            assert name == "embed" or not matrices
            continue
        assert {columns for _, columns in matrices} == {kind.inner(config)}
        times = 2 if name == "gate_up" else 1  # gate and up make one column
        assert sum(rows for rows, _ in matrices) == times * kind.columns(config)


def test_what_a_kind_reads_was_written_before_it():
    written = {"tokens"}
    for kind in STAGE_KINDS.values():
        assert written >= set(kind.reads)
        written |= set(kind.writes)
    assert ATTENTION_BLOCK + FFN_BLOCK == LAYER_KINDS == KINDS[1:6]


def test_keys_and_values_share_a_layers_cache():
    assert buffers_of(("q", "k", "v"), 3) == ("q", "cache.3")
