"""A product added to the residual stream: out_proj and down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from onelaunch.engines.cuda.blocking import inner_of
from onelaunch.engines.cuda.stages.binding import Bound, Sources
from onelaunch.engines.cuda.stages.common import (
    POSITIONS,
    Blocks,
    Place,
    constant,
    corner,
    early_weights,
    place,
    product,
    ready,
    store_rows,
)


@dataclass(frozen=True)
class Extents:
    """INNER; the tile."""

    INNER: int
    blocks: Blocks


class Operands(NamedTuple):
    """y: (N, INNER); w: (D, INNER) of each layer."""

    y: Any
    w: Any
    extents: Any


@triton.jit
def add_product_tile(tile_id, o, run, wait):
    """x += y w^T: out_proj and down with the residual."""
    c: tl.constexpr = o.extents
    blocks: tl.constexpr = c.blocks
    D: tl.constexpr = run.residual.extents.D
    row, column = corner(tile_id, D, blocks.BM, blocks.BN)
    rows, columns, in_rows, in_columns = place(row, column, run.n_rows, D, blocks.BM, blocks.BN)
    at = Place(row, rows, in_rows, column, columns, in_columns)
    w_ptr = o.w
    if not blocks.TMA:
        w_ptr += run.layer * (D * c.INNER)
    early = early_weights(w_ptr, at, blocks, c.INNER, D)
    ready(wait)
    before = tl.load(
        run.residual.x + rows.to(tl.int64)[:, None] * D + columns[None, :],
        mask=in_rows[:, None] & in_columns[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    acc = product(o.y, w_ptr, early, at, blocks, run, c.INNER, D)
    acc += before.to(tl.float32)
    store_rows(acc, tile_id, at, run)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """out_proj or down with its operands."""
    b = s.buffers
    sides = s.sides(kind, layer, b.attn_out if kind == "out_proj" else b.hidden)
    extents = Extents(inner_of(s.config, kind), sides.blocks)
    operands = Operands(sides.x, sides.w, constant(extents))
    cut = s.cut(kind, POSITIONS)
    return Bound(add_product_tile, operands, cut, sides.x_desc, sides.w_desc, sides.warmup)
