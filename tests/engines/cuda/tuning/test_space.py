"""Tiles worth timing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from onelaunch.config import preset
from onelaunch.engines.cuda.blocking import Blocking, blocks, default, inner_of, padded, tilings
from onelaunch.engines.cuda.tuning.space import (
    KINDS,
    MOST,
    PER_TILE,
    WRITES_X,
    Limits,
    options,
    x_columns,
)
from onelaunch.plan import check_tiles, make_plan, make_tiles
from tests.engines.suite import SHAPES, SMALL

CONFIGS = {
    **SHAPES,
    "no power of two": SMALL.with_(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67),
    "heads of 6": SMALL.with_(head_dim=6, n_kv_heads=2),
    "stories15m": preset("stories15m"),
    "stories110m": preset("stories110m"),
    "smollm2-135m": preset("smollm2-135m"),
    "qwen3-0.6b": preset("qwen3-0.6b"),
}
SIZES = [(1, 1), (1, 16), (3, 21), (1, 64), (1, 256), (2, 255), (1, 511), (1, 512), (8, 1024)]
A100 = Limits(108, 166_912)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "limits", [Limits(), A100, Limits(46, 101_376)], ids=["h200", "a100", "small"]
)
def test_options_fit_the_device(config, limits):
    config = config.with_(max_seq_len=2048)
    for batch, sequence in SIZES:
        rows = batch * sequence
        rule = default(config, rows, 2, limits)
        assert x_columns(config, rows)[0] == rule["down"].columns
        for width in x_columns(config, rows):
            for kind in KINDS:
                found = options(config, batch, sequence, 2, kind, width, limits)
                assert found == options(config, batch, sequence, 2, kind, width, limits)
                assert len(set(found)) == len(found) <= MOST + 6
                if kind not in WRITES_X or width == rule["down"].columns:
                    assert found[0] == rule[kind]
                for blocking in found[1:]:
                    check_option(config, kind, blocking, width, limits)
                    assert not blocking.warmup_pass or rows < 512 or found[0].warmup_pass
                    own = not (alike(blocking, found[0]) or blocking.library)
                    if blocking.num_stages and own and kind != "attention":
                        assert blocking.num_stages <= -(-inner_of(config, kind) // blocking.block_k)


def alike(one, other):
    return replace(one, warmup_pass=False, tma=other.tma, programs=0) == replace(
        other, warmup_pass=False, programs=0
    )


def check_option(config, kind, b, width, limits):
    threads = 32 * b.warps
    assert b.warps in (4, 8)
    assert {b.rows, b.columns, b.block_k} <= {16, 32, 64, 128, 256}
    assert b.rows * b.columns / threads <= 128
    assert b.rows >= 16
    if kind in WRITES_X:
        assert b.columns == width
    assert not b.warmup_pass or kind in ("out_proj", "down")
    if kind == "attention":
        elements = (b.rows + 2 * b.columns * b.num_stages) * padded(config.head_dim)
        assert b.rows * padded(config.head_dim) / threads <= 64
    else:
        inner = inner_of(config, kind)
        at_once = b.block_k * b.num_stages if b.num_stages else sum(blocks(inner, b))
        elements = (b.rows + b.columns) * at_once
        if not b.num_stages:
            assert b.columns * at_once / threads <= 320
    if kind == "qkv" and config.qk_norm:
        assert b.columns == padded(config.head_dim)
    assert 2 * elements < limits.shared_bytes


def test_every_option_is_a_right_plan():
    choose = random.Random(0)
    for config in (*SHAPES.values(), CONFIGS["no power of two"]):
        for _ in range(5):
            width = choose.choice(x_columns(config, 63))
            picked = {k: choose.choice(options(config, 3, 21, 2, k, width)) for k in KINDS}
            check_tiles(make_tiles(make_plan(config, 3, 21), tilings(config, picked)))


def test_what_was_best_on_an_h200_is_among_them():
    """The tiles that a search by hand ended with (docs/log.md): 15 million parameters, 256 rows."""
    config = preset("stories15m")
    for kind, tile in {
        "qkv": Blocking(32, 128, num_stages=0),
        "attention": Blocking(16, 256, num_stages=3),
        "out_proj": Blocking(64, 32, 32, 6, warmup_pass=True),
        "gate_up": Blocking(32, 128, num_stages=0),
        "down": Blocking(64, 32, 128, 4, warmup_pass=True),
    }.items():
        assert tile in options(config, 1, 256, 2, kind, 32)
    best = Blocking(128, 256, 64, 4, 8, tma=True, programs=1)
    assert best in options(preset("stories110m"), 1, 1024, 2, "head", 32)
    best = Blocking(64, 128, num_stages=2, chunk=512)
    assert best in options(preset("stories110m"), 1, 1024, 2, "attention", 32)


def test_one_tile_does_not_fill_the_list():
    for kind in ("qkv", "gate_up", "head", "attention"):
        found = options(preset("stories110m"), 1, 256, 2, kind, 32)[1:]
        tiles = [(b.rows, b.columns) for b in found]
        assert max(map(tiles.count, tiles)) <= PER_TILE + 2  # a twin of the rule's, the library
        assert len(set(tiles)) >= 3
