"""What the stages' tiles share: when they begin, where they lie, products, norms, rows of x."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from onelaunch.engines.cuda.sync import wait_for

# How a tile knows that what it reads has been written: the launch before has ended; or it says so
# (programmatic dependent launch); or counters of this launch say so, looked at by Triton's atomic
# additions or by NVIDIA's own instructions.
AFTER, DEPENDENT = tl.constexpr(0), tl.constexpr(1)
COUNTED, COUNTED_PTX = tl.constexpr(2), tl.constexpr(3)
REAL = tl.constexpr(1)  # what a kernel of one stage hands to its tile as `wait`; 0 in a rehearsal
# How many turns of a loop of loads are left to LLVM to unroll, which unrolls that many. Triton
# would do it before its own passes, and one of them looks at all that is around each load.
_UNROLLED = tl.constexpr(16)


@triton.jit
def ready(wait, MODE: tl.constexpr):
    """Go on when what the tile reads has been written."""
    if MODE == DEPENDENT:
        if wait == REAL:
            gdc_wait()
    elif MODE >= COUNTED:
        wait_for(wait, MODE == COUNTED_PTX)


@triton.jit
def corner(tile, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and the first column of a tile of COLUMNS columns."""
    column_tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    return tile // column_tiles * BM, tile % column_tiles * BN


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
    """A block of w^T, (WIDTH, BN), from row `first` on. WHOLE says what exists of it: 0 some rows
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
def early_weights(
    w_ptr,
    columns,
    in_columns,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The weights of a tile that takes them at once; of another one nothing."""
    all_columns: tl.constexpr = 2 if COLUMNS % BN == 0 else 0
    head: tl.constexpr = all_columns + (1 if BK <= INNER else 0)
    rest: tl.constexpr = all_columns + (1 if BK + TAIL <= INNER else 0)
    if LOADS > 0:
        return 0, 0
    elif TAIL > 0:
        return (
            _weights(w_ptr, columns, in_columns, 0, INNER, BK, head),
            _weights(w_ptr, columns, in_columns, BK, INNER, TAIL, rest),
        )
    else:
        return _weights(w_ptr, columns, in_columns, 0, INNER, BK, head), 0


@triton.jit
def product(
    x_ptr,
    w_ptr,
    early,
    row,
    rows,
    in_rows,
    column,
    columns,
    in_columns,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows of x times rows of w, (BM, BN). With TMA x_ptr and w_ptr are tensor descriptors, outside
    of which all is zero."""
    if TMA:
        total = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, INNER, BK, num_stages=LOADS):
            x = x_ptr.load([row, first])
            w = w_ptr.load([column, first])
            total = tl.dot(x, w.T, total, input_precision="ieee")
    elif LOADS == 0:
        x = _inputs(x_ptr, rows, in_rows, 0, INNER, BK, BK <= INNER)
        if TAIL > 0:
            tail = _inputs(x_ptr, rows, in_rows, BK, INNER, TAIL, BK + TAIL <= INNER)
        total = tl.dot(x, early[0], input_precision="ieee")
        if TAIL > 0:
            total = tl.dot(tail, early[1], total, input_precision="ieee")
    else:
        whole: tl.constexpr = INNER % BK == 0
        all_columns: tl.constexpr = 2 if COLUMNS % BN == 0 else 0
        total = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, INNER, BK, num_stages=LOADS):
            x = _inputs(x_ptr, rows, in_rows, first, INNER, BK, whole)
            w = _weights(
                w_ptr, columns, in_columns, first, INNER, BK, all_columns + (1 if whole else 0)
            )
            total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def rstd_of(parts_ptr, n_rows, rows, in_rows, eps, D: tl.constexpr, PARTS: tl.constexpr):
    """1 / rms of rows of x, (BM,), from the sums of their squares, added in their order: by
    `tl.sum` two kernels may add them in two."""
    squares = tl.zeros_like(rows).to(tl.float32)
    for first in tl.static_range(0, PARTS, _UNROLLED):
        end = first + _UNROLLED if first + _UNROLLED < PARTS else PARTS
        for part in tl.range(first, end, num_stages=1):
            at = parts_ptr + part * n_rows + rows
            squares += tl.load(at, mask=in_rows, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(squares / D + eps)


@triton.jit
def store_rows(
    x_ptr,
    parts_ptr,
    values,
    tile,
    n_rows,
    rows,
    columns,
    in_rows,
    in_columns,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile of x, and its sums of squares: of the values as they are stored."""
    parts: tl.constexpr = (D + BN - 1) // BN
    mask = in_rows[:, None] & in_columns[None, :]
    stored = values.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], stored, mask=mask)
    again = tl.where(mask, stored.to(tl.float32), 0.0)
    at = parts_ptr + tile % parts * n_rows + rows
    tl.store(at, tl.sum(again * again, 1), mask=in_rows)
