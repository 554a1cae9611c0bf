"""Any range of a forward's stages in one launch.

A program takes every P-th tile of the stages' tiles in their order, P being the number of programs,
and before each waits for the row tiles that it reads (plan/tiles.py proves that this ends, for any
P). The range of stages, rows, and the numbers of tiles are run-time arguments: every fusion depth
and length is the same binary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda import sync
from onelaunch.engines.cuda.stages import (
    AFTER,
    COUNTED_PTX,
    add_product_tile,
    attention_tile,
    embed_tile,
    gate_up_tile,
    head_tile,
    qkv_tile,
)
from onelaunch.engines.cuda.sync import end, publish
from onelaunch.engines.cuda.watch import began, ended_unsaid, ready

_COUNTERS, _STATUS = tl.constexpr(sync.COUNTERS), tl.constexpr(sync.STATUS)
_GAVE_UP, _BITS = tl.constexpr(sync.GAVE_UP), tl.constexpr(sync.ROW_TILE_BITS)
_ATTENTION_STAGES, _FFN_STAGES = tl.constexpr(3), tl.constexpr(2)
_NOWHERE = tl.constexpr(-8)  # a number for stages that are in no launch


@triton.jit
def _wait_on(counters_ptr, sync_ptr, stage, first_row, last_row, row_tiles, target, patience, BM):
    """What a tile waits for: the row tiles, of BM rows, of a stage from the one with a row to the
    one with another."""
    first = first_row // BM
    count = last_row // BM - first + 1
    says = _GAVE_UP + (stage << _BITS) + first
    return counters_ptr + stage * row_tiles + first, count, target, sync_ptr, says, patience


@triton.jit
def _wait_on_attention(
    counters_ptr, sync_ptr, stage, first_row, last_row, sequence, row_tiles, target, patience,
    BM: tl.constexpr,
):  # fmt: skip
    """The same of attention, whose row tiles are cut text by text."""
    of_text = tl.cdiv(sequence, BM)
    first = first_row // sequence * of_text + first_row % sequence // BM
    last = last_row // sequence * of_text + last_row % sequence // BM
    says = _GAVE_UP + (stage << _BITS) + first
    place = counters_ptr + stage * row_tiles + first
    return place, last - first + 1, target, sync_ptr, says, patience


@triton.jit
def _within(stage, first_stage, last_stage, tiles):
    """How many tiles a launch has of a stage."""
    return tl.where((stage >= first_stage) & (stage < last_stage), tiles, 0)


@triton.jit
def _turn(turn, tiles):
    """The program's first tile of the next stage."""
    programs = tl.num_programs(0)
    return (turn + programs - tiles % programs) % programs


# one binary for every length and every range of stages
_RUN_TIME = (
    "n_rows", "sequence", "logit_rows", "row_tiles", "first_stage", "last_stage", "ends",
    "patience", "most_tiles",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=("tokens_ptr",))
def forward_kernel(
    tokens_ptr,
    embedding_ptr,
    x_ptr,
    parts_ptr,
    qkv_w_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    mixed_ptr,
    out_w_ptr,
    gate_up_w_ptr,
    hidden_ptr,
    down_w_ptr,
    head_w_ptr,
    logits_ptr,
    of_ptr,
    bad_id_ptr,
    sync_ptr,
    records_ptr,
    seed_ptr,
    n_rows,
    sequence,
    logit_rows,
    row_tiles,
    first_stage,
    last_stage,
    ends,
    patience,
    most_tiles,
    eps: tl.float32,
    scale: tl.float32,
    LAYERS: tl.constexpr,
    ATTENTION: tl.constexpr,
    FFN: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    QK_NORM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    X_BN: tl.constexpr,
    EMBED_BM: tl.constexpr,
    QKV_BM: tl.constexpr,
    QKV_BN: tl.constexpr,
    QKV_STEP: tl.constexpr,
    QKV_BK: tl.constexpr,
    QKV_TAIL: tl.constexpr,
    QKV_LOADS: tl.constexpr,
    ATTENTION_BM: tl.constexpr,
    ATTENTION_BN: tl.constexpr,
    ATTENTION_LOADS: tl.constexpr,
    OUT_BM: tl.constexpr,
    OUT_BK: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    OUT_LOADS: tl.constexpr,
    GATE_UP_BM: tl.constexpr,
    GATE_UP_BN: tl.constexpr,
    GATE_UP_BK: tl.constexpr,
    GATE_UP_TAIL: tl.constexpr,
    GATE_UP_LOADS: tl.constexpr,
    DOWN_BM: tl.constexpr,
    DOWN_BK: tl.constexpr,
    DOWN_TAIL: tl.constexpr,
    DOWN_LOADS: tl.constexpr,
    HEAD_BM: tl.constexpr,
    HEAD_BN: tl.constexpr,
    HEAD_BK: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    HEAD_LOADS: tl.constexpr,
    MODE: tl.constexpr,
):
    """Stages first_stage up to, not including, last_stage: 0 is embed, then five a layer, then
    head; where layers hold their ATTENTION or their FFN block alone, three or two a layer and no
    head. `ends` is 1 in the last launch of a forward. Each layer has a qkv of its own: some rows
    may be in the next layer while others still read this one's keys. row_tiles: counters of a
    stage. patience: nanoseconds that a wait waits. records_ptr, most_tiles and seed_ptr are None,
    or as watch.py says."""
    wide: tl.constexpr = (H + 2 * K) * E
    parts: tl.constexpr = (D + X_BN - 1) // X_BN
    qkv_columns: tl.constexpr = (wide + QKV_STEP - 1) // QKV_STEP
    gate_up_columns: tl.constexpr = (2 * F + GATE_UP_BN - 1) // GATE_UP_BN
    head_columns: tl.constexpr = (V + HEAD_BN - 1) // HEAD_BN
    of_layer: tl.constexpr = _ATTENTION_STAGES * ATTENTION + _FFN_STAGES * FFN
    head_stage: tl.constexpr = 1 + of_layer * LAYERS
    counters = sync_ptr + _COUNTERS
    done = tl.load(sync_ptr, cache_modifier=".cg") + 1
    programs = tl.num_programs(0)
    texts = n_rows // sequence
    turn = tl.program_id(0)
    watch = (records_ptr, most_tiles, seed_ptr)

    tiles = _within(0, first_stage, last_stage, tl.cdiv(n_rows, EMBED_BM) * parts)
    for tile in tl.range(turn, tiles, programs, num_stages=1):
        me = (watch, 0, tile)
        began(me)
        ready(me)
        embed_tile(
            tile, None, tokens_ptr, embedding_ptr, x_ptr, parts_ptr, bad_id_ptr, n_rows, V, D,
            EMBED_BM, X_BN, AFTER,
        )  # fmt: skip
        publish(counters + tile // parts, me, MODE == COUNTED_PTX)
    turn = _turn(turn, tiles)

    first_layer = tl.maximum(first_stage - 1, 0) // of_layer
    last_layer = (tl.minimum(last_stage, head_stage) - 1 + of_layer - 1) // of_layer
    for layer in tl.range(first_layer, last_layer, num_stages=1):
        of = tl.full([], 1, tl.int64) * layer
        stage = 1 + of_layer * layer if ATTENTION else _NOWHERE

        tiles = _within(stage, first_stage, last_stage, tl.cdiv(n_rows, QKV_BM) * qkv_columns)
        for tile in tl.range(turn, tiles, programs, num_stages=1):
            me = (watch, stage, tile)
            began(me)
            row = tile // qkv_columns * QKV_BM
            last = tl.minimum(row + QKV_BM, n_rows) - 1
            # x was written by embed, or by the last stage of the layer before
            wait = _wait_on(
                counters, sync_ptr, stage - 1, row, last, row_tiles, done * parts, patience,
                tl.where(layer == 0, EMBED_BM, DOWN_BM if FFN else OUT_BM),
            )  # fmt: skip
            qkv_tile(
                tile, (wait, me), x_ptr, parts_ptr, qkv_w_ptr + of * (wide * D),
                norms_ptr + of * (2 * E), cos_ptr, sin_ptr, qkv_ptr + of * wide * n_rows, n_rows,
                sequence, eps, D, H, K, E, QK_NORM, PARTS, QKV_BM, QKV_BN, QKV_STEP, QKV_BK,
                QKV_TAIL, QKV_LOADS, False, MODE,
            )  # fmt: skip
            publish(counters + stage * row_tiles + tile // qkv_columns, me, MODE == COUNTED_PTX)
        turn = _turn(turn, tiles)

        of_text = tl.cdiv(sequence, ATTENTION_BM)
        tiles = _within(stage + 1, first_stage, last_stage, texts * of_text * H)
        for tile in tl.range(turn, tiles, programs, num_stages=1):
            me = (watch, stage + 1, tile)
            began(me)
            text = tile // H // of_text
            end_of = tl.minimum((tile // H % of_text + 1) * ATTENTION_BM, sequence)
            wait = _wait_on(
                counters, sync_ptr, stage, text * sequence, text * sequence + end_of - 1,
                row_tiles, done * qkv_columns, patience, QKV_BM,
            )  # fmt: skip
            attention_tile(
                tile, (wait, me), qkv_ptr + of * wide * n_rows, mixed_ptr, None, None, sequence,
                scale, H, K, E, ATTENTION_BM, ATTENTION_BN, WIDTH, 0, ATTENTION_LOADS, MODE,
            )  # fmt: skip
            publish(counters + (stage + 1) * row_tiles + tile // H, me, MODE == COUNTED_PTX)
        turn = _turn(turn, tiles)

        tiles = _within(stage + 2, first_stage, last_stage, tl.cdiv(n_rows, OUT_BM) * parts)
        for tile in tl.range(turn, tiles, programs, num_stages=1):
            me = (watch, stage + 2, tile)
            began(me)
            row = tile // parts * OUT_BM
            last = tl.minimum(row + OUT_BM, n_rows) - 1
            wait = _wait_on_attention(
                counters, sync_ptr, stage + 1, row, last, sequence, row_tiles, done * H, patience,
                ATTENTION_BM,
            )  # fmt: skip
            add_product_tile(
                tile, (wait, me), mixed_ptr, out_w_ptr + of * (D * H * E), x_ptr, parts_ptr, n_rows,
                H * E, D, OUT_BM, X_BN, OUT_BK, OUT_TAIL, OUT_LOADS, False, MODE,
            )  # fmt: skip
            publish(counters + (stage + 2) * row_tiles + tile // parts, me, MODE == COUNTED_PTX)
        turn = _turn(turn, tiles)

        if not ATTENTION:
            stage = 1 + of_layer * layer - _ATTENTION_STAGES
        elif not FFN:
            stage = _NOWHERE
        tiles = _within(
            stage + 3, first_stage, last_stage, tl.cdiv(n_rows, GATE_UP_BM) * gate_up_columns
        )
        for tile in tl.range(turn, tiles, programs, num_stages=1):
            me = (watch, stage + 3, tile)
            began(me)
            row = tile // gate_up_columns * GATE_UP_BM
            last = tl.minimum(row + GATE_UP_BM, n_rows) - 1
            wait = _wait_on(
                counters, sync_ptr, stage + 2, row, last, row_tiles, done * parts, patience,
                OUT_BM if ATTENTION else tl.where(layer == 0, EMBED_BM, DOWN_BM),
            )  # fmt: skip
            gate_up_tile(
                tile, (wait, me), x_ptr, parts_ptr, gate_up_w_ptr + of * (2 * F * D), hidden_ptr,
                n_rows, eps, D, F, PARTS, GATE_UP_BM, GATE_UP_BN, GATE_UP_BK, GATE_UP_TAIL,
                GATE_UP_LOADS, False, MODE,
            )  # fmt: skip
            publish(
                counters + (stage + 3) * row_tiles + tile // gate_up_columns,
                me,
                MODE == COUNTED_PTX,
            )
        turn = _turn(turn, tiles)

        tiles = _within(stage + 4, first_stage, last_stage, tl.cdiv(n_rows, DOWN_BM) * parts)
        for tile in tl.range(turn, tiles, programs, num_stages=1):
            me = (watch, stage + 4, tile)
            began(me)
            row = tile // parts * DOWN_BM
            last = tl.minimum(row + DOWN_BM, n_rows) - 1
            wait = _wait_on(
                counters, sync_ptr, stage + 3, row, last, row_tiles, done * gate_up_columns,
                patience, GATE_UP_BM,
            )  # fmt: skip
            add_product_tile(
                tile, (wait, me), hidden_ptr, down_w_ptr + of * (D * F), x_ptr, parts_ptr, n_rows,
                F, D, DOWN_BM, X_BN, DOWN_BK, DOWN_TAIL, DOWN_LOADS, False, MODE,
            )  # fmt: skip
            publish(counters + (stage + 4) * row_tiles + tile // parts, me, MODE == COUNTED_PTX)
        turn = _turn(turn, tiles)

    head_rows = tl.cdiv(logit_rows, HEAD_BM)
    tiles = _within(head_stage, first_stage, last_stage, head_rows * head_columns)
    for tile in tl.range(turn, tiles, programs, num_stages=1):
        me = (watch, head_stage, tile)
        began(me)
        row = tile % head_rows * HEAD_BM  # row tile first: see head_tile
        last = tl.minimum(row + HEAD_BM, logit_rows) - 1
        wait = _wait_on(
            counters, sync_ptr, head_stage - 1, tl.load(of_ptr + row), tl.load(of_ptr + last),
            row_tiles, done * parts, patience, DOWN_BM,
        )  # fmt: skip
        head_tile(
            tile, (wait, me), x_ptr, parts_ptr, head_w_ptr, logits_ptr, of_ptr,
            sync_ptr + _STATUS, logit_rows, n_rows, eps, D, V, PARTS, HEAD_BM, HEAD_BN, HEAD_BK,
            HEAD_TAIL, HEAD_LOADS, False, MODE,
        )  # fmt: skip
        ended_unsaid(me)
    if ends > 0:
        end(sync_ptr, watch, MODE == COUNTED_PTX)
