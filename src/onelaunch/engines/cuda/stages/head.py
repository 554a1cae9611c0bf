"""Logits, and what a library makes them of."""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.common import (
    corner,
    early_weights,
    place,
    product,
    ready,
    rstd_of,
)


@triton.jit
def head_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    logits_ptr,
    of_ptr,
    status_ptr,
    n_rows,
    x_rows,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """logits: (n_rows, V) of normalized rows of x: those that of, (n_rows,), says; with TMA, of all
    in their order. Its tiles go row tile first: the weights, which may be more than the second
    cache holds, come by once. They are NaN where a status says that the forward was given up."""
    row_tiles = tl.maximum(tl.cdiv(n_rows, BM), 1)
    row, column = tile % row_tiles * BM, tile // row_tiles * BN
    rows, columns, in_rows, in_columns = place(row, column, n_rows, V, BM, BN)
    of = rows if TMA else tl.load(of_ptr + rows, mask=in_rows, other=0)
    early = early_weights(w_ptr, columns, in_columns, D, V, BN, BK, TAIL, LOADS)
    ready(wait, MODE)
    if status_ptr is not None:  # who gave up wrote it before it went on
        status = tl.load(status_ptr, cache_modifier=".cg")
    total = product(
        x_ptr, w_ptr, early, row, of, in_rows, column, columns, in_columns, D, V, BM, BN, BK, TAIL,
        LOADS, TMA,
    )  # fmt: skip
    # behind the product, or a loop of tiles is no single pipeline
    total *= rstd_of(parts_ptr, x_rows, of, in_rows, eps, D, PARTS)[:, None]
    if status_ptr is not None:
        total = tl.where(status == 0, total, float("nan"))
    to = logits_ptr + rows.to(tl.int64)[:, None] * V + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, total.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalize_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    normalized_ptr,
    of_ptr,
    n_rows,
    x_rows,
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    """normalized: (n_rows, D), the rows of x that of, (n_rows,), says, over their rms."""
    row, column = corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = place(row, column, n_rows, D, BM, BN)
    of = tl.load(of_ptr + rows, mask=in_rows, other=0)
    ready(wait, MODE)
    rstd = rstd_of(parts_ptr, x_rows, of, in_rows, eps, D, PARTS)
    mask = in_rows[:, None] & in_columns[None, :]
    at = x_ptr + of.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    to = normalized_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(to, (x * rstd[:, None]).to(normalized_ptr.dtype.element_ty), mask=mask)
