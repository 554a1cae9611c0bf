"""Logits, and the normalized rows of which a library computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from onelaunch.engines.cuda.blocking import padded
from onelaunch.engines.cuda.stages.binding import Bound, Sources
from onelaunch.engines.cuda.stages.common import (
    LOGIT_ROWS,
    Blocks,
    Cut,
    Place,
    constant,
    corner,
    early_weights,
    place,
    product,
    ready,
    rstd_of,
)


@dataclass(frozen=True)
class Extents:
    """V; the tile."""

    V: int
    blocks: Blocks


class Operands(NamedTuple):
    """w: (V, D); of: (logit_rows,), int32, the rows of x that get logits, in their order; status:
    where one launch writes that it timed out, or None."""

    w: Any
    of: Any
    status: Any
    extents: Any


@triton.jit
def head_tile(tile_id, o, run, wait):
    """logits: (logit_rows, V) of normalized rows of x: those in `of`; with TMA, of all in their
    order. Its tiles go row tile first: the weights, which may be more than the L2 holds, come by
    once. They are NaN where the status is that of a forward that timed out."""
    c: tl.constexpr = o.extents
    blocks: tl.constexpr = c.blocks
    D: tl.constexpr = run.residual.extents.D
    row_tiles = tl.maximum(tl.cdiv(run.logit_rows, blocks.BM), 1)
    row, column = tile_id % row_tiles * blocks.BM, tile_id // row_tiles * blocks.BN
    rows, columns, in_rows, in_columns = place(
        row, column, run.logit_rows, c.V, blocks.BM, blocks.BN
    )
    of = rows if blocks.TMA else tl.load(o.of + rows, mask=in_rows, other=0)
    at = Place(row, of, in_rows, column, columns, in_columns)
    early = early_weights(o.w, at, blocks, D, c.V)
    ready(wait)
    if o.status is not None:  # a tile that timed out wrote it before it went on
        status = tl.load(o.status, cache_modifier=".cg")
    acc = product(run.residual.x, o.w, early, at, blocks, run, D, c.V)
    # behind the product, or a loop of tiles is no single pipeline
    acc *= rstd_of(run, of, in_rows)[:, None]
    if o.status is not None:
        acc = tl.where(status == 0, acc, float("nan"))
    to = run.logits + rows.to(tl.int64)[:, None] * c.V + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, acc.to(run.logits.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class NormalizeExtents:
    """The tile's rows and columns."""

    BM: int
    BN: int


class NormalizeOperands(NamedTuple):
    """normalized: (logit_rows, D); of: as in Operands."""

    normalized: Any
    of: Any
    extents: Any


@triton.jit
def normalize_tile(tile_id, o, run, wait):
    """normalized: the rows of x in `of`, over their rms."""
    c: tl.constexpr = o.extents
    D: tl.constexpr = run.residual.extents.D
    row, column = corner(tile_id, D, c.BM, c.BN)
    rows, columns, in_rows, in_columns = place(row, column, run.logit_rows, D, c.BM, c.BN)
    of = tl.load(o.of + rows, mask=in_rows, other=0)
    ready(wait)
    rstd = rstd_of(run, of, in_rows)
    mask = in_rows[:, None] & in_columns[None, :]
    at = run.residual.x + of.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    to = o.normalized + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(to, (x * rstd[:, None]).to(o.normalized.dtype.element_ty), mask=mask)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """head with its operands."""
    sides = s.sides(kind, layer, s.buffers.x)
    extents = Extents(s.config.vocab_size, sides.blocks)
    operands = Operands(sides.w, s.buffers.of, s.status, constant(extents))
    return Bound(head_tile, operands, s.cut(kind, LOGIT_ROWS), sides.x_desc, sides.w_desc)


def bind_normalize(s: Sources, normalized: Tensor) -> tuple[Bound, int]:
    """What makes the normalized rows, (logit_rows, D), that a library multiplies; its tiles."""
    dim, of = s.config.dim, s.buffers.of
    rows, columns = 16, min(128, padded(dim))
    operands = NormalizeOperands(normalized, of, constant(NormalizeExtents(rows, columns)))
    column_tiles = -(-dim // columns)
    cut = Cut(LOGIT_ROWS, rows, column_tiles)
    tiles = -(-of.shape[0] // rows) * column_tiles
    return Bound(normalize_tile, operands, cut), tiles
