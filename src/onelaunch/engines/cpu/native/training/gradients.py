"""Gradients of weights: sums over all tokens. An item is some columns of a matrix, so that nothing
is added up between threads."""

from __future__ import annotations

from onelaunch.engines.cpu.native.training.products import (
    BLOCK,
    LANES,
    ROW,
    WIDE,
    WIDTH,
    over_tokens,
)
from onelaunch.engines.cpu.native.vectors import (
    add,
    compiled,
    get_f32,
    get_i64,
    load,
    multiply,
    put_f32,
    splat,
    store,
    transpose,
)
from onelaunch.engines.cpu.training.layout import PANEL_BLOCKS


@compiled
def turn(x, x_block, width, rstd, weight, blocks, panel, staging):
    """BLOCK features of some blocks, token by token: panel[token] = the features, times rstd and
    weight where rstd is not 0, and zero from feature `width` on."""
    for b in range(blocks):
        for f in range(BLOCK):
            for half in range(0, ROW, WIDTH):
                value = splat(0.0)
                if f < width:
                    value = load(x + b * x_block + f * ROW + half)
                    if rstd != 0:
                        scale = load(rstd + b * ROW + half)
                        value = multiply(multiply(value, scale), splat(get_f32(weight + 4 * f)))
                store(staging + f * ROW + half, value)
        for i in range(2):
            for j in range(2):
                to = panel + (b * BLOCK + i * LANES) * ROW + j * WIDTH
                transpose(staging + j * LANES * ROW + i * WIDTH, ROW, to, ROW)


@compiled
def weight_gradient(
    x, inputs, rstd, weight, d_out, outputs, d_block, blocks, rows, gradient, adds, item, scratch
):
    """The columns BLOCK p .. of rows `rows` r .. of a gradient (outputs, inputs), item being
    r * panels + p; see `layout.Operation`."""
    panels = (inputs + BLOCK - 1) // BLOCK
    column = item % panels * BLOCK
    first = item // panels * rows
    after = min(outputs, first + rows)
    width = min(BLOCK, inputs - column)
    panel = scratch
    staging = panel + PANEL_BLOCKS * BLOCK * ROW
    edge = staging + BLOCK * ROW
    for b in range(0, blocks, PANEL_BLOCKS):
        n = min(PANEL_BLOCKS, blocks - b)
        source = x + b * inputs * ROW + column * ROW
        scale = rstd + b * ROW if rstd != 0 else 0
        turn(source, inputs * ROW, width, scale, weight + 4 * column, n, panel, staging)
        also = adds or b > 0
        for j in range(first, after, WIDE):
            columns = min(WIDE, after - j)
            to = gradient + 4 * (j * inputs + column)
            scalars = d_out + b * d_block + j * ROW
            if width == BLOCK:
                over_tokens(
                    panel, ROW, scalars, ROW, 4, BLOCK, d_block, n, to, 4 * inputs, columns, also
                )
                continue
            over_tokens(panel, ROW, scalars, ROW, 4, BLOCK, d_block, n, edge, ROW, columns, False)
            for row in range(columns):
                for i in range(width):
                    at = to + 4 * (row * inputs + i)
                    value = get_f32(edge + row * ROW + 4 * i)
                    put_f32(at, get_f32(at) + value if also else value)


@compiled
def embedding_gradient(d_x, dim, tokens, length, sequence_blocks, blocks, gradient, item, scratch):
    """Add each token's gradient to its row, BLOCK columns of all of them; tokens from `length` on
    are a sequence's padding."""
    column = item * BLOCK
    width = min(BLOCK, dim - column)
    staging = scratch + BLOCK * ROW
    for b in range(blocks):
        source = d_x + (b * dim + column) * ROW
        turn(source, dim * ROW, width, 0, 0, 1, scratch, staging)
        before = b % sequence_blocks * BLOCK
        for t in range(min(BLOCK, length - before)):
            row = get_i64(tokens + 8 * (b * BLOCK + t))
            to = gradient + 4 * (row * dim + column)
            if width == BLOCK:
                for half in range(0, ROW, WIDTH):
                    store(to + half, add(load(to + half), load(scratch + t * ROW + half)))
            else:
                for i in range(width):
                    value = get_f32(to + 4 * i) + get_f32(scratch + t * ROW + 4 * i)
                    put_f32(to + 4 * i, value)


@compiled
def norm_gradient(partial, row, width, blocks, gradient, adds):
    """The sum of the blocks' parts, `row` bytes apart."""
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        total = load(partial + 4 * i)
        for b in range(1, blocks):
            total = add(total, load(partial + b * row + 4 * i))
        at = gradient + 4 * i
        store(at, add(load(at), total) if adds else total)
    for i in range(whole, width):
        rest = get_f32(partial + 4 * i)
        for b in range(1, blocks):
            rest += get_f32(partial + b * row + 4 * i)
        at = gradient + 4 * i
        put_f32(at, get_f32(at) + rest if adds else rest)
