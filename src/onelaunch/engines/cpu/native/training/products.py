"""Products of a training step: grids of sums kept in registers.

Activations lie in blocks of BLOCK tokens, two vectors: of a matrix of F features over T tokens, the
block of tokens, then the feature, then the token (T / BLOCK, F, BLOCK). So a token is a lane: what
is done to each feature of a token needs no lane to meet another, and a weight is a scalar for all
lanes, read where PyTorch keeps it.

    out[j, :] = sum over k of vectors[k, :] * scalars[j, k]

Vectors are two wide; k runs over `blocks` pieces of `n`, each sum in order in its own accumulator:
its bits do not depend on the tile it is taken in.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from onelaunch.engines.cpu.native.vectors import (
    LANES,
    LOCALITY_L1,
    REGISTERS,
    VECTOR_IR,
    broadcast,
    compiled,
    constant,
    get_f32,
    load,
    load_vector,
    multiply_add,
    pointer,
    prefetch,
    put_f32,
    store,
)
from onelaunch.engines.cpu.training.layout import MOST_SCALARS, MOST_TERMS

WIDTH = 4 * LANES  # bytes of a vector
BLOCK = 2 * LANES  # tokens
ROW = 4 * BLOCK  # bytes of a block's feature
WIDE, NARROW = (MOST_SCALARS, 4) if REGISTERS >= 32 else (6, 2)  # scalars taken at once
WIDE_ROW = 512  # floats; from here on rows lie on few sets of the nearest cache
CACHE_LINE = 64
_I64, _F32 = ir.IntType(64), ir.FloatType()


def _make_tile(columns: int, scalar_row: int | None, adds: bool, long_sums: bool) -> Any:
    """An intrinsic

        tile(vectors, vectors_step, scalars, scalars_row, scalars_step, n, jump, blocks, out,
            out_row)

    Addresses, rows and steps are in bytes. The vectors of k = (block, i) lie at vectors +
    (block n + i) vectors_step, the scalar j at scalars + block jump + i scalars_step + j
    scalars_row; `scalar_row`, where given, is known when compiling. The sums go to out + j out_row,
    or are added to what is there.
    """

    def code(context, builder, sig, args):
        vectors, vectors_step, scalars, scalars_row, scalars_step, n, jump, blocks, out, out_row = (
            args
        )
        grid = [
            [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(columns)]
            for _ in range(2)
        ]
        row = _I64(scalar_row) if scalar_row is not None else scalars_row
        if long_sums:
            for j in range(columns):
                line = builder.add(out, builder.mul(out_row, _I64(j)))
                for offset in range(0, ROW, CACHE_LINE):
                    to = builder.add(line, _I64(offset))
                    prefetch(builder, to, LOCALITY_L1, write=True)
        at = cgutils.alloca_once_value(builder, vectors)
        block_at, scalar_at = (cgutils.alloca_once_value(builder, scalars) for _ in range(2))
        with cgutils.for_range(builder, blocks, intp=_I64) as outer:
            block = builder.add(scalars, builder.mul(outer.index, jump))
            builder.store(block, block_at)
            builder.store(block, scalar_at)
            with cgutils.for_range(builder, n, intp=_I64):
                here, first = builder.load(at), builder.load(scalar_at)
                if long_sums:  # the scalars of the next tile, too far apart to be foreseen
                    start = builder.load(block_at)
                    into = builder.mul(builder.sub(first, start), _I64(columns))
                    ahead = builder.add(builder.add(start, into), _I64(columns * ROW))
                    prefetch(builder, ahead, LOCALITY_L1)
                pair = [load_vector(builder, builder.add(here, _I64(WIDTH * i))) for i in range(2)]
                for j in range(columns):
                    address = builder.add(first, builder.mul(row, _I64(j)))
                    scalar = broadcast(builder, builder.load(pointer(builder, address, _F32)))
                    for i in range(2):
                        old = builder.load(grid[i][j])
                        builder.store(multiply_add(builder, pair[i], scalar, old), grid[i][j])
                builder.store(builder.add(here, vectors_step), at)
                builder.store(builder.add(first, scalars_step), scalar_at)
        for j in range(columns):
            for i in range(2):
                to = builder.add(builder.add(out, builder.mul(out_row, _I64(j))), _I64(WIDTH * i))
                value = builder.load(grid[i][j])
                if adds:
                    value = builder.fadd(load_vector(builder, to), value)
                builder.store(value, pointer(builder, to, VECTOR_IR), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typingctx,
        vectors,
        vectors_step,
        scalars,
        scalars_row,
        scalars_step,
        n,
        jump,
        blocks,
        out,
        out_row,
    ):
        return types.void(*[types.int64] * 10), code

    return tile


def _make_product(scalar_row: int | None, long_sums: bool = False) -> Any:
    """A function with a tile's arguments, for `columns` scalars, and whether it adds."""
    sizes = (WIDE, NARROW, 1)
    wide, narrow, one = (_make_tile(n, scalar_row, False, long_sums) for n in sizes)
    wide_add, narrow_add, one_add = (_make_tile(n, scalar_row, True, long_sums) for n in sizes)

    @compiled
    def product(
        v, v_step, s, s_row, s_step, n, jump, blocks,
        out, out_row, columns, adds,
    ):  # fmt: skip
        j = 0
        while j + WIDE <= columns:
            if adds:
                wide_add(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            else:
                wide(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            s += WIDE * s_row
            out += WIDE * out_row
            j += WIDE
        while j + NARROW <= columns:
            if adds:
                narrow_add(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            else:
                narrow(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            s += NARROW * s_row
            out += NARROW * out_row
            j += NARROW
        while j < columns:
            if adds:
                one_add(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            else:
                one(v, v_step, s, s_row, s_step, n, jump, blocks, out, out_row)
            s += s_row
            out += out_row
            j += 1

    return product


by_row = _make_product(None)
"""Scalars of one k lie `s_row` bytes apart."""
side_by_side = _make_product(4)
"""Scalars of one k are neighbours (s_row must be 4)."""
by_feature = _make_product(ROW)
"""Scalars of one k are a token of neighbouring features (s_row must be ROW)."""
over_tokens = _make_product(ROW, long_sums=True)
"""The same, for sums over many blocks of tokens."""


@compiled
def _part(terms):
    """Terms of each part of a sum."""
    parts = (terms + MOST_TERMS - 1) // MOST_TERMS
    return (terms + parts - 1) // parts


@compiled
def weigh(x, x_block, inputs, weight, outputs, out, out_block, blocks, adds):
    """out = weight . x for each token: weight is PyTorch's (outputs, inputs). The blocks of x and
    out lie x_block and out_block bytes apart."""
    part = _part(inputs)
    for first in range(0, inputs, part):
        terms = min(part, inputs - first)
        for j in range(0, outputs, WIDE):
            columns = min(WIDE, outputs - j)
            scalars = weight + 4 * (j * inputs + first)
            for b in range(blocks):
                by_row(
                    x + b * x_block + first * ROW, ROW, scalars, 4 * inputs, 4, terms, 0, 1,
                    out + b * out_block + j * ROW, ROW, columns, adds or first > 0,
                )  # fmt: skip


@compiled
def _gather(weight, inputs, columns, terms, last, panel):
    """Some columns of some rows of a weight, one row behind the other. Whole vectors are copied:
    what lies behind a row's columns is overwritten by the next. `last`: the rows end where the
    matrix does, behind which nothing may be read."""
    whole = terms - 1 if last else terms
    for i in range(whole):
        for at in range(0, 4 * WIDE, WIDTH):
            store(panel + 4 * WIDE * i + at, load(weight + 4 * inputs * i + at))
    for i in range(whole, terms):
        for j in range(columns):
            value = get_f32(weight + 4 * (inputs * i + j))
            put_f32(panel + 4 * (WIDE * i + j), value)


@compiled
def weigh_back(d_out, d_block, outputs, weight, inputs, d_x, x_block, blocks, adds, panel):
    """d_x = transposed weight . d_out for each token. `panel` has room for PANEL_FLOATS: a tile's
    weights lie a row apart; where rows are wide, they go there first, one behind the other."""
    part = _part(outputs)
    gathers = inputs >= WIDE_ROW
    for first in range(0, outputs, part):
        terms = min(part, outputs - first)
        for j in range(0, inputs, WIDE):
            columns = min(WIDE, inputs - j)
            scalars, scalars_step = weight + 4 * (first * inputs + j), 4 * inputs
            if gathers:
                _gather(scalars, inputs, columns, terms, first + terms == outputs, panel)
                scalars, scalars_step = panel, 4 * WIDE
            for b in range(blocks):
                side_by_side(
                    d_out + b * d_block + first * ROW, ROW, scalars, 4, scalars_step, terms, 0, 1,
                    d_x + b * x_block + j * ROW, ROW, columns, adds or first > 0,
                )  # fmt: skip
