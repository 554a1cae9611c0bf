"""What is done to each token alone: norms, rotary embedding, SwiGLU. A lane is a token."""

from __future__ import annotations

import numpy as np

from onelaunch.engines.cpu.native.training.products import LANES, ROW, WIDTH
from onelaunch.engines.cpu.native.vectors import (
    add,
    compiled,
    divide,
    exp,
    fma,
    get_f32,
    load,
    multiply,
    put_f32,
    splat,
    square_roots,
    store,
    subtract,
    sum_lanes,
)

ONE = np.float32(1.0)


@compiled
def norm(x, width, weight, eps, rstd, out):
    """out = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), of a block's `width` features."""
    for half in range(0, ROW, WIDTH):
        total = splat(0.0)
        for i in range(width):
            value = load(x + i * ROW + half)
            total = fma(value, value, total)
        mean = multiply(total, splat(ONE / np.float32(width)))
        scale = divide(splat(ONE), square_roots(add(mean, splat(eps))))
        store(rstd + half, scale)
        for i in range(width):
            value = multiply(load(x + i * ROW + half), scale)
            store(out + i * ROW + half, multiply(value, splat(get_f32(weight + 4 * i))))


@compiled
def norm_backward(x, width, weight, rstd, d_out, d_x, partial, adds):
    """d_x, which holds the residual's gradient, gets that of the norm's input added; in a norm
    without a residual (`adds` false) it is replaced. The weight's gradient, summed over the block's
    tokens, is added to the `width` numbers at `partial`."""
    for half in range(0, ROW, WIDTH):
        scale = load(rstd + half)
        total = splat(0.0)
        for i in range(width):
            x_hat = multiply(load(x + i * ROW + half), scale)
            gradient = load(d_out + i * ROW + half)
            product = multiply(gradient, x_hat)
            put_f32(partial + 4 * i, get_f32(partial + 4 * i) + sum_lanes(product))
            total = fma(product, splat(get_f32(weight + 4 * i)), total)
        mean = multiply(total, splat(ONE / np.float32(width)))
        for i in range(width):
            at = i * ROW + half
            x_hat = multiply(load(x + at), scale)
            weighted = multiply(load(d_out + at), splat(get_f32(weight + 4 * i)))
            value = multiply(subtract(weighted, multiply(x_hat, mean)), scale)
            store(d_x + at, add(load(d_x + at), value) if adds else value)


@compiled
def zero(at, size):
    """`size` bytes, whole vectors."""
    for i in range(0, size, WIDTH):
        store(at + i, splat(0.0))


@compiled
def copy(source, to, size):
    """`size` bytes, whole vectors."""
    for i in range(0, size, WIDTH):
        store(to + i, load(source + i))


@compiled
def rotate(head, head_dim, interleaved, cos, sin, back):
    """Rotary embedding of a head in place, or its transpose: a rotation `back`."""
    pairs = head_dim // 2
    apart, step = (ROW, 2 * ROW) if interleaved else (pairs * ROW, ROW)
    for i in range(pairs):
        for half in range(0, ROW, WIDTH):
            at = head + i * step + half
            a, b = load(at), load(at + apart)
            c, s = load(cos + i * ROW + half), load(sin + i * ROW + half)
            if back:
                store(at, fma(a, c, multiply(b, s)))
                store(at + apart, subtract(multiply(b, c), multiply(a, s)))
            else:
                store(at, subtract(multiply(a, c), multiply(b, s)))
                store(at + apart, fma(b, c, multiply(a, s)))


@compiled
def swiglu(gate, up, out, size):
    """out = silu(gate) * up, of `size` bytes."""
    one = splat(ONE)
    for i in range(0, size, WIDTH):
        g = load(gate + i)
        sigmoid = divide(one, add(one, exp(subtract(splat(0.0), g))))
        store(out + i, multiply(multiply(g, sigmoid), load(up + i)))


@compiled
def swiglu_backward(gate, up, d_out, out, size):
    """gate and up become their gradients; out = silu(gate) * up once more."""
    one = splat(ONE)
    for i in range(0, size, WIDTH):
        g, u, d = load(gate + i), load(up + i), load(d_out + i)
        sigmoid = divide(one, add(one, exp(subtract(splat(0.0), g))))
        silu = multiply(g, sigmoid)
        slope = multiply(sigmoid, add(one, subtract(g, silu)))
        store(out + i, multiply(silu, u))
        store(gate + i, multiply(multiply(d, u), slope))
        store(up + i, multiply(d, silu))


@compiled
def padded_row(width):
    """Bytes of a row of `width` floats, padded to whole vectors."""
    return (width + LANES - 1) // LANES * WIDTH
