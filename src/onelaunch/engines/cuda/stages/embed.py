"""Rows of the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.binding import Bound, Sources
from onelaunch.engines.cuda.stages.common import (
    POSITIONS,
    Place,
    constant,
    corner,
    place,
    ready,
    store_rows,
)


@dataclass(frozen=True)
class Extents:
    """V; the tile's rows and columns."""

    V: int
    BM: int
    BN: int


class Operands(NamedTuple):
    """embedding: (V, D); bad_id: (1,), int64, in memory that the host reads."""

    embedding: Any
    bad_id: Any
    extents: Any


@triton.jit
def embed_tile(tile_id, o, run, wait):
    """x: (N, D) from the tokens' rows of the embedding. The row of an id outside the vocabulary is
    NaN, and the id is stored at bad_id."""
    c: tl.constexpr = o.extents
    D: tl.constexpr = run.residual.extents.D
    row, column = corner(tile_id, D, c.BM, c.BN)
    rows, columns, in_rows, in_columns = place(row, column, run.n_rows, D, c.BM, c.BN)
    ready(wait)
    token = tl.load(run.ids + rows, mask=in_rows, other=0).to(tl.int64)
    known = (token >= 0) & (token < c.V)
    tl.store(o.bad_id + tl.zeros_like(token), token, mask=in_rows & (known == 0))
    token = tl.where(known, token, 0)
    mask = in_rows[:, None] & in_columns[None, :]
    x = tl.load(o.embedding + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
    x = tl.where(known[:, None], x, float("nan"))
    at = Place(row, rows, in_rows, column, columns, in_columns)
    store_rows(x, tile_id, at, run)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """embed with its operands."""
    blocking = s.blockings[kind]
    extents = Extents(s.config.vocab_size, blocking.rows, blocking.columns)
    operands = Operands(s.packed.embedding, s.packed.bad_id, constant(extents))
    return Bound(embed_tile, operands, s.cut(kind, POSITIONS))
