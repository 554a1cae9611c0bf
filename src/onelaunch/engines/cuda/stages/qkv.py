"""Queries, keys and values: norm, product, the heads' norm, rotation."""

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
    early_weights,
    product,
    ready,
    rstd_of,
)


@dataclass(frozen=True)
class Extents:
    """H, K, E; a tile has STEP columns, BN at most, with norms of heads one head."""

    H: int
    K: int
    E: int
    STEP: int
    blocks: Blocks


class Operands(NamedTuple):
    """w: ((H + 2 K) E, D) of each layer; norms: (2, E), of queries and keys, of each layer, or
    None; cos, sin: (context, E / 2); positions: (N,), int32, those of the rows, or None where
    row i has i % sequence; qkv: (N, (H + 2 K) E) of each layer."""

    w: Any
    norms: Any
    cos: Any
    sin: Any
    positions: Any
    qkv: Any
    extents: Any


@triton.jit
def qkv_tile(tile_id, o, run, wait):
    """qkv: norm, product, the heads' norm, rotation."""
    c: tl.constexpr = o.extents
    blocks: tl.constexpr = c.blocks
    D: tl.constexpr = run.residual.extents.D
    wide: tl.constexpr = (c.H + 2 * c.K) * c.E
    column_tiles: tl.constexpr = (wide + c.STEP - 1) // c.STEP
    row, start = tile_id // column_tiles * blocks.BM, tile_id % column_tiles * c.STEP
    rows = row + tl.arange(0, blocks.BM)
    within = tl.arange(0, blocks.BN)
    columns = start + within
    in_rows = rows < run.n_rows
    in_columns = (within < c.STEP) & (columns < wide)
    at = Place(row, rows, in_rows, start, columns, in_columns)
    # a narrower step leaves columns out
    full: tl.constexpr = wide if c.STEP == blocks.BN else blocks.BN + 1
    w_ptr = o.w
    if not blocks.TMA:
        w_ptr += run.layer * (wide * D)
    early = early_weights(w_ptr, at, blocks, D, full)
    # neighbours are a rotary pair; values turn by nothing
    pair = start // 2 + tl.arange(0, blocks.BN // 2)
    rotated = in_rows[:, None] & (pair < (c.H + c.K) * c.E // 2)[None, :]
    if o.positions is None:
        positions = rows % run.sequence
    else:
        positions = tl.load(o.positions + rows, mask=in_rows, other=0)
    angle = positions[:, None] * (c.E // 2) + (pair % (c.E // 2))[None, :]
    if blocks.NUM_STAGES == 0:
        cos = tl.load(o.cos + angle, mask=rotated, other=1.0)
        sin = tl.load(o.sin + angle, mask=rotated, other=0.0)
    ready(wait)
    rstd = rstd_of(run, rows, in_rows)
    acc = product(run.residual.x, w_ptr, early, at, blocks, run, D, full)
    acc *= rstd[:, None]
    if o.norms is not None:  # noqa: SIM102 - the one is known when compiled
        if start < (c.H + c.K) * c.E:
            norm_ptr = o.norms + run.layer * (2 * c.E) + tl.where(start < c.H * c.E, 0, c.E)
            norm = tl.load(norm_ptr + within, mask=in_columns, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(acc * acc, 1) / c.E + run.residual.eps)
            acc *= scale[:, None] * norm[None, :]
    if blocks.NUM_STAGES > 0:  # not before: a large tile's product needs the registers
        cos = tl.load(o.cos + angle, mask=rotated, other=1.0)
        sin = tl.load(o.sin + angle, mask=rotated, other=0.0)
    a, b = tl.split(tl.reshape(acc, [blocks.BM, blocks.BN // 2, 2]))
    acc = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [blocks.BM, blocks.BN])
    to = o.qkv + run.layer * wide * run.n_rows + rows.to(tl.int64)[:, None] * wide
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to + columns[None, :], acc.to(o.qkv.dtype.element_ty), mask=mask)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """qkv with its operands."""
    c, w, b = s.config, s.packed, s.buffers
    sides = s.sides(kind, layer, b.x)
    norms = w.norms if w.norms is None or layer is None else w.norms[layer]
    step = s.tilings[kind].columns
    extents = Extents(c.n_heads, c.n_kv_heads, c.head_dim, step, sides.blocks)
    operands = Operands(sides.w, norms, w.cos, w.sin, b.positions, s.qkv(layer), constant(extents))
    cut = s.cut(kind, POSITIONS)
    return Bound(qkv_tile, operands, cut, sides.x_desc, sides.w_desc, sides.warmup)
