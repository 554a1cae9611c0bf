"""The gated product of the feed-forward block."""

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
def gate_up_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    hidden_ptr,
    n_rows,
    eps,
    D: tl.constexpr,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """hidden: (N, F) = silu(gate) up (2002.05202), of the normalized rows of x. Rows of w alternate
    between gate and up: a tile has BN of them, so BN / 2 columns of hidden."""
    row, column = corner(tile, 2 * F, BM, BN)
    rows, columns, in_rows, in_columns = place(row, column, n_rows, 2 * F, BM, BN)
    early = early_weights(w_ptr, columns, in_columns, D, 2 * F, BN, BK, TAIL, LOADS)
    ready(wait, MODE)
    rstd = rstd_of(parts_ptr, n_rows, rows, in_rows, eps, D, PARTS)
    total = product(
        x_ptr, w_ptr, early, row, rows, in_rows, column, columns, in_columns, D, 2 * F, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total *= rstd[:, None]
    gate, up = tl.split(tl.reshape(total, [BM, BN // 2, 2]))
    hidden = gate / (1 + tl.exp(-gate)) * up
    _, columns, _, in_columns = place(row, column // 2, n_rows, F, BM, BN // 2)
    to = hidden_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
