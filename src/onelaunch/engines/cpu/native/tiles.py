"""The one inner loop: a grid of sums of products kept in registers.

    acc[i][j] = sum over k of a[i, k] * b[j, k]

for `rows` rows of a and `columns` rows of b, vectors of LANES at a time. Matrix products, attention
scores and the mix of values are all of this form; they differ in what lies where. Each sum runs
over k in order in its own accumulator: it has the same bits in a tile of any size.
"""

from __future__ import annotations

from typing import Any, Literal

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from onelaunch.engines.cpu.native.vectors import (
    LANES,
    VECTOR_IR,
    broadcast,
    constant,
    fold,
    load_bfloat16,
    load_vector,
    multiply_add,
    pointer,
    prefetch,
)

CACHE_LINE = 64
_I64, _F32 = ir.IntType(64), ir.FloatType()


def make_tile(
    rows: int,
    columns: int,
    a_kind: Literal["float32", "bfloat16"] = "float32",
    b_kind: Literal["vector", "scalar"] = "vector",
    finish: Literal["sum", "vectors"] = "sum",
    prefetch_locality: int | None = None,
) -> Any:
    """An intrinsic

        tile(a, a_row, a_step, b, b_row, b_step, n, out, out_row, scale)

    All addresses, strides and steps are in bytes; k goes from 0 to n. a[i, k] is the vector at
    a + i a_row + k a_step; b[j, k] likewise, or one float32 for every lane. With finish "sum" the
    lanes of each accumulator are added up and scale times the sum is stored as the float32
    out[j][i], at out + j out_row + 4 i; with "vectors" scale times the accumulator itself is
    stored, at out + j out_row + 4 LANES i. With `prefetch_locality` (see `vectors`) a further
    argument, `ahead`, is how far behind each cache line of a that is read one is prefetched.
    """
    narrow = a_kind == "bfloat16"
    vector_bytes = (2 if narrow else 4) * LANES

    def code(context, builder, sig, args):
        a, a_row, a_step, b, b_row, b_step, n, out, out_row, scale, *ahead = args
        grid = [
            [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(columns)]
            for _ in range(rows)
        ]
        a_rows = [builder.add(a, builder.mul(a_row, _I64(i))) for i in range(rows)]
        b_rows = [builder.add(b, builder.mul(b_row, _I64(j))) for j in range(columns)]
        with cgutils.for_range(builder, n, intp=_I64) as loop:
            a_at, b_at = builder.mul(loop.index, a_step), builder.mul(loop.index, b_step)
            b_values = [_b_value(builder, builder.add(row, b_at), b_kind) for row in b_rows]
            for i in range(rows):
                address = builder.add(a_rows[i], a_at)
                if ahead and i * vector_bytes % CACHE_LINE == 0:
                    prefetch(builder, builder.add(address, *ahead), prefetch_locality)
                value = (load_bfloat16 if narrow else load_vector)(builder, address)
                for j in range(columns):
                    old = builder.load(grid[i][j])
                    builder.store(multiply_add(builder, value, b_values[j], old), grid[i][j])
                if ahead:  # no instruction: it keeps the 16 requests from being made at once
                    builder.fence("acq_rel", "singlethread")
        _finish(builder, grid, out, out_row, scale, finish)
        return context.get_dummy_value()

    if prefetch_locality is not None:

        @intrinsic
        def tile_ahead(
            typingctx, a, a_row, a_step, b, b_row, b_step, n, out, out_row, scale, ahead
        ):
            return types.void(*[types.int64] * 9, types.float32, types.int64), code

        return tile_ahead

    @intrinsic
    def tile(
        typingctx,
        a,
        a_row,
        a_step,
        b,
        b_row,
        b_step,
        n,
        out,
        out_row,
        scale,
    ):
        return types.void(*[types.int64] * 9, types.float32), code

    return tile


def _b_value(builder: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    if kind == "vector":
        return load_vector(builder, address)
    return broadcast(builder, builder.load(pointer(builder, address, _F32)))


def _finish(
    builder: ir.IRBuilder,
    grid: list[list[ir.Value]],
    out: ir.Value,
    out_row: ir.Value,
    scale: ir.Value,
    finish: str,
) -> None:
    rows, columns = len(grid), len(grid[0])
    for j in range(columns):
        at = builder.add(out, builder.mul(out_row, _I64(j)))
        sums = [builder.load(grid[i][j]) for i in range(rows)]
        if finish == "vectors":
            for i, value in enumerate(sums):
                scaled = builder.fmul(value, broadcast(builder, scale))
                target = pointer(builder, builder.add(at, _I64(4 * LANES * i)), VECTOR_IR)
                builder.store(scaled, target, align=4)
            continue
        for i, value in enumerate(fold(builder, sums)):
            per = min(rows, value.type.count)
            scales = ir.Constant(value.type, ir.Undefined)
            for lane in range(value.type.count):
                scales = builder.insert_element(scales, scale, ir.IntType(32)(lane))
            target = pointer(builder, builder.add(at, _I64(4 * per * i)), value.type)
            builder.store(builder.fmul(value, scales), target, align=4)
