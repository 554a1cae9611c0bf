"""Code that the stages' tiles share: arguments, beginnings, products, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from onelaunch.engines.cuda.sync import COUNTED, DEPENDENT, wait_for

# Which rows a stage has, and how its row tiles are cut from them: all positions; the positions of
# each sequence by themselves; those that get logits.
POSITIONS, WITHIN_SEQUENCES, LOGIT_ROWS = range(3)
INTERPRETED: bool = triton.knobs.runtime.interpret
# How many turns of a loop of loads are left to LLVM to unroll, which unrolls that many. Triton
# would do it before its own passes, and one of them looks at all that is around each load.
_UNROLLED = tl.constexpr(16)


@dataclass(frozen=True)
class Cut:
    """How a stage is cut into tiles: its rows (POSITIONS, WITHIN_SEQUENCES or LOGIT_ROWS), rows of
    a row tile, column tiles of a row tile. In one launch the same of the stage that it reads, and
    `read_first` of that in the first layer, where it is another one, and whether a stage waits for
    this one: its tiles are then counted."""

    rows_of: int
    BM: int
    COLUMN_TILES: int
    read: Cut | None = None
    read_first: Cut | None = None
    waited_for: bool = True


@dataclass(frozen=True)
class Blocks:
    """A product's tile: rows and columns, how much of the inner dimension is taken at once, what is
    left of it where the weights come early, how many blocks are on their way, and whether they come
    by descriptors."""

    BM: int
    BN: int
    BK: int
    TAIL: int
    NUM_STAGES: int
    TMA: bool


class Stage(NamedTuple):
    """One stage of a kernel. `tile` is a jit function, tile(tile_id, operands, run, wait), never
    inside a constexpr: Triton would know it by its name, and run its binary after an edit. `cut` is
    a Cut, a constexpr. Without a tile it is no stage: `is None` fails on a tuple that has None in
    it."""

    tile: Any = None
    operands: Any = None
    cut: Any = None


class Residual(NamedTuple):
    """The residual stream, which most stages read or write. x: (N, D); partial_sumsq: (SUMS, N),
    float32, the sums of squares of each row's columns in as many parts as x has column tiles; eps:
    of the norms; extents: D and SUMS. Once for all stages: as operands of each they cost one launch
    registers."""

    x: Any
    partial_sumsq: Any
    eps: Any
    extents: Any


@dataclass(frozen=True)
class ResidualExtents:
    """The extents of Residual."""

    D: int
    SUMS: int


class Run(NamedTuple):
    """The arguments that the tiles of a kernel get in addition to their operands: what stages
    share, and what Triton must not specialize or takes as a kernel's own parameters only. ids:
    (n_rows,), int64; logits: (logit_rows, V); descriptors of a product's two sides, or None;
    `layer`, 0 where operands are one layer's. To be built where it is passed: bound to a name, the
    constexprs inside become tensors."""

    residual: Any
    ids: Any
    logits: Any
    x_desc: Any
    w_desc: Any
    n_rows: Any
    sequence: Any
    logit_rows: Any
    layer: Any


def constant(value: Any) -> Any:
    """Extents, or what else is plain data, as a kernel's constexpr. One dataclass takes the host as
    long, at each launch, as one number would; of the interpreter constexprs have no fields."""
    return value if INTERPRETED else tl.constexpr(value)


class Launched(NamedTuple):
    """A tile whose inputs another launch has written, or is writing; `real` is 0 in a warm-up
    pass, which must not wait."""

    MODE: Any
    real: Any


class Place(NamedTuple):
    """Where a tile lies: its first row and column, all of them, and which of them exist. `rows` are
    those of what a product reads."""

    row: Any
    rows: Any
    in_rows: Any
    column: Any
    columns: Any
    in_columns: Any


@triton.jit
def ready(wait):
    """Go on when what the tile reads has been written."""
    if wait.MODE == DEPENDENT:
        if wait.real == 1:
            gdc_wait()
    elif wait.MODE >= COUNTED:
        wait_for(wait)


@triton.jit
def corner(tile_id, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and the first column of a tile of COLUMNS columns."""
    column_tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    return tile_id // column_tiles * BM, tile_id % column_tiles * BN


@triton.jit
def place(row, column, n_rows, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a tile of (n_rows, COLUMNS), and which of them exist."""
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    return rows, columns, rows < n_rows, columns < COLUMNS


@triton.jit
def _weights(
    w_ptr,
    columns,
    in_columns,
    first,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block of w^T, (WIDTH, BN), from row `first` on. WHOLE is what exists of it: 0 some rows
    and some columns, 1 all of its rows, 2 all of its columns, 3 all."""
    inner = first + tl.arange(0, WIDTH)
    at = w_ptr + columns[None, :].to(tl.int64) * INNER + inner[:, None]
    if WHOLE == 3:
        return tl.load(at)
    elif WHOLE == 2:
        return tl.load(at, mask=(inner < INNER)[:, None], other=0.0)
    elif WHOLE == 1:
        return tl.load(at, mask=in_columns[None, :], other=0.0)
    else:
        return tl.load(at, mask=in_columns[None, :] & (inner < INNER)[:, None], other=0.0)


@triton.jit
def _inputs(
    x_ptr, rows, in_rows, first, INNER: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """A block of x, (BM, WIDTH), from column `first` on, all of which exists where WHOLE."""
    inner = first + tl.arange(0, WIDTH)
    mask = in_rows[:, None]
    if not WHOLE:
        mask &= (inner < INNER)[None, :]
    return tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * INNER + inner[None, :],
        mask=mask,
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def early_weights(w_ptr, at, blocks: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights of a tile that takes them at once; of another one nothing."""
    all_columns: tl.constexpr = 2 if COLUMNS % blocks.BN == 0 else 0
    head: tl.constexpr = all_columns + (1 if blocks.BK <= INNER else 0)
    rest: tl.constexpr = all_columns + (1 if blocks.BK + blocks.TAIL <= INNER else 0)
    if blocks.NUM_STAGES > 0:
        return 0, 0
    elif blocks.TAIL > 0:
        return (
            _weights(w_ptr, at.columns, at.in_columns, 0, INNER, blocks.BK, head),
            _weights(w_ptr, at.columns, at.in_columns, blocks.BK, INNER, blocks.TAIL, rest),
        )
    else:
        return _weights(w_ptr, at.columns, at.in_columns, 0, INNER, blocks.BK, head), 0


@triton.jit
def product(
    x_ptr, w_ptr, early, at, blocks: tl.constexpr, run, INNER: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows of x times rows of w, (BM, BN). With TMA both come by descriptors, outside of which all
    is zero."""
    if blocks.TMA:
        acc = tl.full([blocks.BM, blocks.BN], 0.0, tl.float32)
        for first in tl.range(0, INNER, blocks.BK, num_stages=blocks.NUM_STAGES):
            x = run.x_desc.load([at.row, first])
            w = run.w_desc.load([at.column, first])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    elif blocks.NUM_STAGES == 0:
        x = _inputs(x_ptr, at.rows, at.in_rows, 0, INNER, blocks.BK, blocks.BK <= INNER)
        if blocks.TAIL > 0:
            all_of_tail: tl.constexpr = blocks.BK + blocks.TAIL <= INNER
            tail = _inputs(x_ptr, at.rows, at.in_rows, blocks.BK, INNER, blocks.TAIL, all_of_tail)
        acc = tl.dot(x, early[0], input_precision="ieee")
        if blocks.TAIL > 0:
            acc = tl.dot(tail, early[1], acc, input_precision="ieee")
    else:
        whole: tl.constexpr = INNER % blocks.BK == 0
        some: tl.constexpr = (2 if COLUMNS % blocks.BN == 0 else 0) + (1 if whole else 0)
        acc = tl.full([blocks.BM, blocks.BN], 0.0, tl.float32)
        for first in tl.range(0, INNER, blocks.BK, num_stages=blocks.NUM_STAGES):
            x = _inputs(x_ptr, at.rows, at.in_rows, first, INNER, blocks.BK, whole)
            w = _weights(w_ptr, at.columns, at.in_columns, first, INNER, blocks.BK, some)
            acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def rstd_of(run, rows, in_rows):
    """1 / rms of rows of x, (BM,), from the sums of their squares, added in their order: by
    `tl.sum` two kernels may add them in two."""
    SUMS: tl.constexpr = run.residual.extents.SUMS
    squares = tl.zeros_like(rows).to(tl.float32)
    for first in tl.static_range(0, SUMS, _UNROLLED):
        end = first + _UNROLLED if first + _UNROLLED < SUMS else SUMS
        for number in tl.range(first, end, num_stages=1):
            at = run.residual.partial_sumsq + number * run.n_rows + rows
            squares += tl.load(at, mask=in_rows, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(squares / run.residual.extents.D + run.residual.eps)


@triton.jit
def store_rows(values, tile_id, at, run):
    """A tile of x, and its sums of squares: of the values as they are stored."""
    D: tl.constexpr = run.residual.extents.D
    mask = at.in_rows[:, None] & at.in_columns[None, :]
    stored = values.to(run.residual.x.dtype.element_ty)
    to = run.residual.x + at.rows.to(tl.int64)[:, None] * D + at.columns[None, :]
    tl.store(to, stored, mask=mask)
    again = tl.where(mask, stored.to(tl.float32), 0.0)
    to = run.residual.partial_sumsq + tile_id % run.residual.extents.SUMS * run.n_rows + at.rows
    tl.store(to, tl.sum(again * again, 1), mask=at.in_rows)
