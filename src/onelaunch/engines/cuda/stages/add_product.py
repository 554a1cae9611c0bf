"""A product added to the residual stream: out_proj and down."""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.common import (
    corner,
    early_weights,
    place,
    product,
    ready,
    store_rows,
)


@triton.jit
def add_product_tile(
    tile,
    wait,
    y_ptr,
    w_ptr,
    x_ptr,
    parts_ptr,
    n_rows,
    INNER: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """x += y w^T, x: (N, D), y: (N, INNER): out_proj and down with the residual."""
    row, column = corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = place(row, column, n_rows, D, BM, BN)
    early = early_weights(w_ptr, columns, in_columns, INNER, D, BN, BK, TAIL, LOADS)
    ready(wait, MODE)
    before = tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
        mask=in_rows[:, None] & in_columns[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    total = product(
        y_ptr, w_ptr, early, row, rows, in_rows, column, columns, in_columns, INNER, D, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total += before.to(tl.float32)
    store_rows(x_ptr, parts_ptr, total, tile, n_rows, rows, columns, in_rows, in_columns, D, BN)
