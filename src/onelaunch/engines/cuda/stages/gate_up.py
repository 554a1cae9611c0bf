"""The gated product of the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

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
    rstd_of,
)


@dataclass(frozen=True)
class Extents:
    """F; the tile."""

    F: int
    blocks: Blocks


class Operands(NamedTuple):
    """w: (2 F, D) of each layer, rows of gate and up in turn; hidden: (N, F)."""

    w: Any
    hidden: Any
    extents: Any


@triton.jit
def gate_up_tile(tile_id, o, run, wait):
    """hidden: (N, F) = silu(gate) up (2002.05202), of the normalized rows of x. A tile has BN rows
    of w, so BN / 2 columns of hidden."""
    c: tl.constexpr = o.extents
    blocks: tl.constexpr = c.blocks
    D: tl.constexpr = run.residual.extents.D
    row, column = corner(tile_id, 2 * c.F, blocks.BM, blocks.BN)
    rows, columns, in_rows, in_columns = place(
        row, column, run.n_rows, 2 * c.F, blocks.BM, blocks.BN
    )
    at = Place(row, rows, in_rows, column, columns, in_columns)
    w_ptr = o.w
    if not blocks.TMA:
        w_ptr += run.layer * (2 * c.F * D)
    early = early_weights(w_ptr, at, blocks, D, 2 * c.F)
    ready(wait)
    rstd = rstd_of(run, rows, in_rows)
    acc = product(run.residual.x, w_ptr, early, at, blocks, run, D, 2 * c.F)
    acc *= rstd[:, None]
    gate, up = tl.split(tl.reshape(acc, [blocks.BM, blocks.BN // 2, 2]))
    hidden = gate / (1 + tl.exp(-gate)) * up
    _, columns, _, in_columns = place(row, column // 2, run.n_rows, c.F, blocks.BM, blocks.BN // 2)
    to = o.hidden + rows.to(tl.int64)[:, None] * c.F + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, hidden.to(o.hidden.dtype.element_ty), mask=mask)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """gate_up with its operands."""
    sides = s.sides(kind, layer, s.buffers.x)
    extents = Extents(s.config.hidden_dim, sides.blocks)
    operands = Operands(sides.w, s.buffers.hidden, constant(extents))
    cut = s.cut(kind, POSITIONS)
    return Bound(gate_up_tile, operands, cut, sides.x_desc, sides.w_desc, sides.warmup)
