"""Rows of the embedding."""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.common import corner, place, ready, store_rows


@triton.jit
def embed_tile(
    tile,
    wait,
    tokens_ptr,
    embedding_ptr,
    x_ptr,
    parts_ptr,
    bad_id_ptr,
    n_rows,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    """x: (N, D) from the tokens' rows of the embedding, (V, D). The row of an id outside the
    vocabulary is NaN, and the id is stored at bad_id, in memory that the host reads."""
    row, column = corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = place(row, column, n_rows, D, BM, BN)
    ready(wait, MODE)
    token = tl.load(tokens_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    known = (token >= 0) & (token < V)
    tl.store(bad_id_ptr + tl.zeros_like(token), token, mask=in_rows & (known == 0))
    token = tl.where(known, token, 0)
    mask = in_rows[:, None] & in_columns[None, :]
    found = tl.load(embedding_ptr + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
    found = tl.where(known[:, None], found, float("nan"))
    store_rows(x_ptr, parts_ptr, found, tile, n_rows, rows, columns, in_rows, in_columns, D, BN)
