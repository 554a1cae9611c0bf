"""Causal attention of a sequence's head, forward and backward.

Queries are the lanes of the forward; in the backward keys are, so that the gradients of keys and
values are sums over queries in registers; for the queries' the scores' gradients are transposed.
"""

from __future__ import annotations

import math

import numpy as np

from onelaunch.engines.cpu.native.training.products import (
    BLOCK,
    LANES,
    ROW,
    WIDTH,
    by_feature,
    side_by_side,
)
from onelaunch.engines.cpu.native.vectors import (
    add,
    compiled,
    divide,
    exp,
    first_lanes,
    fma,
    get_f32,
    lanes_from,
    load,
    maximum,
    multiply,
    splat,
    store,
    subtract,
    transpose,
)

ONE = np.float32(1.0)


@compiled
def attend(
    q, k, v, step, head_dim, blocks, scale,
    largest, inverse_sum, out, out_step, scores,
):  # fmt: skip
    """Attention of a head: q, k, v are its first features in the sequence's first block, a block is
    `step` bytes from the next. `scores` has room for blocks * BLOCK rows."""
    for i in range(blocks):
        query = q + i * step
        for j in range(i + 1):
            side_by_side(
                query, ROW, k + j * step, 4, ROW, head_dim, 0, 1,
                scores + j * BLOCK * ROW, ROW, BLOCK, False,
            )  # fmt: skip
        keys = (i + 1) * BLOCK
        for half in range(2):
            at = scores + half * WIDTH
            top = splat(-math.inf)
            for key in range(keys - BLOCK):
                top = maximum(top, load(at + key * ROW))
            for key in range(BLOCK):  # a query sees no key behind it
                to = at + (keys - BLOCK + key) * ROW
                seen = lanes_from(load(to), key - half * LANES, splat(-math.inf))
                store(to, seen)
                top = maximum(top, seen)
            total = splat(0.0)
            shift = multiply(top, splat(-scale))
            for key in range(keys):
                value = exp(fma(load(at + key * ROW), splat(scale), shift))
                store(at + key * ROW, value)
                total = add(total, value)
            place = 4 * BLOCK * i + half * WIDTH
            inverse = divide(splat(ONE), total)
            store(largest + place, top)
            store(inverse_sum + place, inverse)
        to = out + i * out_step
        by_feature(scores, ROW, v, ROW, 4, BLOCK, step, i + 1, to, ROW, head_dim, False)
        for half in range(2):
            inverse = load(inverse_sum + 4 * BLOCK * i + half * WIDTH)
            for e in range(head_dim):
                place = to + e * ROW + half * WIDTH
                store(place, multiply(load(place), inverse))


@compiled
def attend_backward(
    q, k, v, step, head_dim, blocks, scale, largest, inverse_sum, delta,
    d_out, out_step, d_q, d_k, d_v, adds, scratch,
):  # fmt: skip
    """Gradients of a head's q, and of k and v, to which they are added where `adds`: heads that
    share them follow each other. `scratch` has room for 2 blocks * BLOCK + BLOCK rows."""
    probabilities = scratch
    d_scores = scratch + blocks * BLOCK * ROW
    turned = d_scores + blocks * BLOCK * ROW
    for j in range(blocks):
        key, value = k + j * step, v + j * step
        for i in range(j, blocks):
            p, d = probabilities + (i - j) * BLOCK * ROW, d_scores + (i - j) * BLOCK * ROW
            side_by_side(key, ROW, q + i * step, 4, ROW, head_dim, 0, 1, p, ROW, BLOCK, False)
            side_by_side(
                value, ROW, d_out + i * out_step, 4, ROW, head_dim, 0, 1, d, ROW, BLOCK, False
            )
            for query in range(BLOCK):
                at = 4 * (i * BLOCK + query)
                shift = splat(get_f32(largest + at) * -scale)
                inverse = splat(get_f32(inverse_sum + at))
                mean = splat(get_f32(delta + at))
                for half in range(2):
                    place = query * ROW + half * WIDTH
                    weight = multiply(exp(fma(load(p + place), splat(scale), shift)), inverse)
                    if i == j:
                        weight = first_lanes(weight, query + 1 - half * LANES)
                    gradient = multiply(subtract(load(d + place), mean), splat(scale))
                    store(p + place, weight)
                    store(d + place, multiply(weight, gradient))
        n = blocks - j
        by_feature(
            probabilities, ROW, d_out + j * out_step, ROW, 4, BLOCK, out_step, n,
            d_v + j * step, ROW, head_dim, adds,
        )  # fmt: skip
        by_feature(
            d_scores, ROW, q + j * step, ROW, 4, BLOCK, step, n,
            d_k + j * step, ROW, head_dim, adds,
        )  # fmt: skip
        for i in range(j, blocks):
            d = d_scores + (i - j) * BLOCK * ROW
            for a in range(2):
                for b in range(2):
                    source = d + a * LANES * ROW + b * WIDTH
                    transpose(source, ROW, turned + b * LANES * ROW + a * WIDTH, ROW)
            by_feature(turned, ROW, key, ROW, 4, BLOCK, 0, 1, d_q + i * step, ROW, head_dim, j > 0)


@compiled
def dot(a, b, n, out):
    """Per token the sum over n features of a times b."""
    for half in range(0, ROW, WIDTH):
        total = splat(0.0)
        for i in range(n):
            at = i * ROW + half
            total = fma(load(a + at), load(b + at), total)
        store(out + half, total)
