"""Triton kernels of the rotary embedding of packed rows, with norms of queries and keys or without.

A packed row has H heads of queries, K of keys, K of values, each E wide: C = (H + 2 K) E columns.
A pair of a head's elements is rotated by the angle of its position (Su et al., 2104.09864):
    first' = first cos - second sin,   second' = second cos + first sin
The pairs are (2 p, 2 p + 1) in the interleaved layout and (p, p + E/2) in the other; p < P = E/2.

A tile has R heads, in the order of rows and within a row of heads; BLOCK is P padded to a power of
two. Row n has position n % S. All arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_pairs(
    ptr, offsets, in_rows, P: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second elements, (R, BLOCK) each, of the heads at `offsets`, (R, 1)."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        mask = in_rows & (columns < 2 * P)
        x = tl.load(ptr + (offsets + columns), mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        mask = in_rows & (columns < P)
        first = tl.load(ptr + (offsets + columns), mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptr + (offsets + columns + P), mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    ptr, offsets, in_rows, first, second,
    P: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_pairs`."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        mask = in_rows & (columns < 2 * P)
        x = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK))
        tl.store(ptr + (offsets + columns), x.to(ptr.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        mask = in_rows & (columns < P)
        tl.store(ptr + (offsets + columns), first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + (offsets + columns + P), second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pair_columns(P: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of a head that hold the first and the second elements, (BLOCK,) each."""
    pair = tl.arange(0, BLOCK)
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + P
    return first, second


@triton.jit
def _load_weight(ptr, P: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A norm's weight at first and second elements, (1, BLOCK) each."""
    first, second = _pair_columns(P, BLOCK, INTERLEAVED)
    in_head = tl.arange(0, BLOCK) < P
    return (
        tl.load(ptr + first, mask=in_head, other=0.0)[None, :],
        tl.load(ptr + second, mask=in_head, other=0.0)[None, :],
    )


@triton.jit
def load_angles(cos_ptr, sin_ptr, row, in_rows, S, P: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine at the positions of rows, (R, 1): (R, BLOCK) each."""
    columns = tl.arange(0, BLOCK)[None, :]
    mask = in_rows & (columns < P)
    offsets = (row % S) * P + columns
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _rstd(first, second, eps, E: tl.constexpr):
    squares = tl.sum(first * first + second * second, 1, keep_dims=True)
    return tl.rsqrt(squares / E + eps)


@triton.jit
def rotate_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    out_ptr,
    qkv_stride,
    out_stride,
    rows,
    S,
    eps: tl.float32,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Queries and keys of packed rows, normalized where the weights are not None, and rotated."""
    P: tl.constexpr = E // 2
    index = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    row = index // (H + K)
    head = index - row * (H + K)
    in_rows = row < rows
    row64 = row.to(tl.int64)
    first, second = _load_pairs(
        qkv_ptr, row64 * qkv_stride + head * E, in_rows, P, BLOCK, INTERLEAVED
    )
    if q_weight_ptr is not None:
        q_first, q_second = _load_weight(q_weight_ptr, P, BLOCK, INTERLEAVED)
        k_first, k_second = _load_weight(k_weight_ptr, P, BLOCK, INTERLEAVED)
        rstd = _rstd(first, second, eps, E)
        first *= rstd * tl.where(head < H, q_first, k_first)
        second *= rstd * tl.where(head < H, q_second, k_second)
    cos, sin = load_angles(cos_ptr, sin_ptr, row, in_rows, S, P, BLOCK)
    store_pairs(
        out_ptr, row64 * out_stride + head * E, in_rows,
        first * cos - second * sin, second * cos + first * sin, P, BLOCK, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _heads_backward(
    dy_ptr, row_stride, head_stride, cos_ptr, sin_ptr, weight_ptr, qkv_ptr, dqkv_ptr, partial_ptr,
    rows, S, eps,
    HEADS: tl.constexpr, COLUMN: tl.constexpr, C: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """A CTA's tiles of HEADS heads a row, which are at COLUMN of the packed rows."""
    P: tl.constexpr = E // 2
    program = tl.program_id(0)
    if weight_ptr is not None:
        w_first, w_second = _load_weight(weight_ptr, P, BLOCK, INTERLEAVED)
        dw_first = tl.zeros([R, BLOCK], tl.float32)
        dw_second = tl.zeros([R, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows * HEADS, R), tl.num_programs(0), num_stages=1):
        index = tile * R + tl.arange(0, R)[:, None]
        row = index // HEADS
        head = index - row * HEADS
        in_rows = row < rows
        row64 = row.to(tl.int64)
        packed = row64 * C + (COLUMN + head * E)
        first, second = _load_pairs(
            dy_ptr, row64 * row_stride + head * head_stride, in_rows, P, BLOCK, INTERLEAVED
        )
        if ROTATED:
            cos, sin = load_angles(cos_ptr, sin_ptr, row, in_rows, S, P, BLOCK)
            d_first = first * cos + second * sin
            d_second = second * cos - first * sin
        else:
            d_first = first
            d_second = second
        if weight_ptr is not None:
            n_first, n_second = _load_pairs(qkv_ptr, packed, in_rows, P, BLOCK, INTERLEAVED)
            rstd = tl.where(in_rows, _rstd(n_first, n_second, eps, E), 0.0)
            n_first *= rstd
            n_second *= rstd
            dw_first += d_first * n_first
            dw_second += d_second * n_second
            d_first *= w_first
            d_second *= w_second
            dots = tl.sum(d_first * n_first + d_second * n_second, 1, keep_dims=True) / E
            d_first = rstd * (d_first - n_first * dots)
            d_second = rstd * (d_second - n_second * dots)
        store_pairs(dqkv_ptr, packed, in_rows, d_first, d_second, P, BLOCK, INTERLEAVED)
    if weight_ptr is not None:
        first_column, second_column = _pair_columns(P, BLOCK, INTERLEAVED)
        in_head = tl.arange(0, BLOCK) < P
        partial_ptr += program * E
        tl.store(partial_ptr + first_column, tl.sum(dw_first, 0), mask=in_head)
        tl.store(partial_ptr + second_column, tl.sum(dw_second, 0), mask=in_head)


@triton.jit
def rotate_backward_kernel(
    gradients,
    strides,
    cos_ptr,
    sin_ptr,
    weights,
    qkv_ptr,
    dqkv_ptr,
    partials,
    rows,
    S,
    eps: tl.float32,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """The gradient of packed rows from those of queries and keys, rotated or not, and of values.

    `gradients` are those three, `strides` their row and head strides in turn; those of values may
    be None, and are there already then. `weights` and `partials` are those of queries and keys, or
    None. A CTA takes every P-th tile of queries, then of keys, then of values, and writes one row
    of each weight's (P, E) partial sums. A tile is read before it is written, so that gradients may
    lie where they are to be.
    """
    C: tl.constexpr = (H + 2 * K) * E
    _heads_backward(
        gradients[0], strides[0], strides[1], cos_ptr, sin_ptr, weights[0], qkv_ptr, dqkv_ptr,
        partials[0], rows, S, eps, H, 0, C, E, R, BLOCK, INTERLEAVED, ROTATED,
    )  # fmt: skip
    _heads_backward(
        gradients[1], strides[2], strides[3], cos_ptr, sin_ptr, weights[1], qkv_ptr, dqkv_ptr,
        partials[1], rows, S, eps, K, H * E, C, E, R, BLOCK, INTERLEAVED, ROTATED,
    )  # fmt: skip
    if gradients[2] is not None:
        # values are copied as halves, whatever the layout of pairs
        _heads_backward(
            gradients[2], strides[4], strides[5], cos_ptr, sin_ptr, None, qkv_ptr, dqkv_ptr,
            None, rows, S, eps, K, (H + K) * E, C, E, R, BLOCK, False, False,
        )  # fmt: skip
