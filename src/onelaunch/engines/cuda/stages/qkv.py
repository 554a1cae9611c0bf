"""Queries, keys and values: norm, product, the heads' norm, rotation."""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.common import early_weights, product, ready, rstd_of


@triton.jit
def qkv_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    n_rows,
    sequence,
    eps,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    QK_NORM: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """qkv: (N, (H + 2 K) E): norm, product, the heads' norm, rotation. A tile has STEP columns, BN
    at most; with QK_NORM they are one head. norms: (2, E), of queries and keys."""
    wide: tl.constexpr = (H + 2 * K) * E
    column_tiles: tl.constexpr = (wide + STEP - 1) // STEP
    row, start = tile // column_tiles * BM, tile % column_tiles * STEP
    rows = row + tl.arange(0, BM)
    within = tl.arange(0, BN)
    columns = start + within
    in_rows = rows < n_rows
    in_columns = (within < STEP) & (columns < wide)
    full: tl.constexpr = wide if STEP == BN else BN + 1  # a narrower step leaves columns out
    early = early_weights(w_ptr, columns, in_columns, D, full, BN, BK, TAIL, LOADS)
    # neighbours are a rotary pair; values turn by nothing
    pair = start // 2 + tl.arange(0, BN // 2)
    turns = in_rows[:, None] & (pair < (H + K) * E // 2)[None, :]
    angle = (rows % sequence)[:, None] * (E // 2) + (pair % (E // 2))[None, :]
    if LOADS == 0:
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    ready(wait, MODE)
    rstd = rstd_of(parts_ptr, n_rows, rows, in_rows, eps, D, PARTS)
    total = product(
        x_ptr, w_ptr, early, row, rows, in_rows, start, columns, in_columns, D, full, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total *= rstd[:, None]
    if QK_NORM:  # noqa: SIM102 - the one is known when compiled
        if start < (H + K) * E:
            norm_ptr = norms_ptr + tl.where(start < H * E, 0, E)
            norm = tl.load(norm_ptr + within, mask=in_columns, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(total * total, 1) / E + eps)
            total *= scale[:, None] * norm[None, :]
    if LOADS > 0:  # not before: a large tile's product needs the registers
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    a, b = tl.split(tl.reshape(total, [BM, BN // 2, 2]))
    total = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BM, BN])
    to = qkv_ptr + rows.to(tl.int64)[:, None] * wide + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, total.to(qkv_ptr.dtype.element_ty), mask=mask)
