"""Triton kernels of causal attention of grouped queries in training, forward and backward.

    s = q k' scale,   p = softmax(s),   o = p v           (online softmax: 2205.14135)
    delta = rowsum(do * o),   ds = p * (do v' - delta)    (2307.08691)
    dq = ds k scale,   dk = ds' q scale,   dv = p' do
p is computed again from lse = log2(sum over keys of 2^(s log2(e))), float32, (H, N).
With dropout o = (m p) v, where m is 0 or 1 / (1 - probability); then dv = (m p)' do and
ds = p * (m (do v') - delta).

N rows are B sequences of S positions. H heads of queries, K of keys and of values, each E wide; a
head's columns are padded to PADDED, a power of two. `strides` are those of rows and of heads, of
queries, keys and values, and in the backward of dout. Products read the compute dtype and sum in
float32. No sum depends on the order in which CTAs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.training.dropout import keep_weights
from onelaunch.engines.cuda.training.rotary import load_angles, store_pairs


@triton.jit
def _head_columns(E: tl.constexpr, PADDED: tl.constexpr, HALVES: tl.constexpr):
    """The columns of a head in a tile's order, and which of them it has, (PADDED,) each. With
    HALVES each half is padded, so that the elements of a pair are PADDED / 2 apart."""
    column = tl.arange(0, PADDED)
    if HALVES and PADDED != E:
        pair = column % (PADDED // 2)
        return column // (PADDED // 2) * (E // 2) + pair, pair < E // 2
    else:
        return column, column < E


@triton.jit
def _load_tile(
    ptr, row_stride, position, S,
    E: tl.constexpr, PADDED: tl.constexpr, HALVES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A head at positions of a sequence, (positions, PADDED). With EVEN all are before S."""
    column, in_head = _head_columns(E, PADDED, HALVES)
    at = ptr + (position[:, None] * row_stride + column[None, :])
    if EVEN and PADDED == E:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, mask=in_head[None, :], other=0.0)
    else:
        return tl.load(at, mask=(position < S)[:, None] & in_head[None, :], other=0.0)


@triton.jit
def _load_numbers(ptr, position, S, EVEN: tl.constexpr):
    """One number of each position, 0 behind the sequence."""
    if EVEN:
        return tl.load(ptr + position)
    else:
        return tl.load(ptr + position, mask=position < S, other=0.0)


@triton.jit
def attention_forward_kernel(
    inputs,
    strides,
    out_ptr,
    lse_ptr,
    n_rows,
    S,
    scale_log2: tl.float32,
    generator_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """ROWS queries of a head; those that see the most keys first. The scale is times log2(e)."""
    blocks = tl.cdiv(S, ROWS)
    sequence_heads = tl.num_programs(0) // blocks
    first = (blocks - 1 - tl.program_id(0) // sequence_heads) * ROWS
    sequence_head = tl.program_id(0) % sequence_heads
    head = sequence_head % H
    start = (sequence_head // H).to(tl.int64) * S
    key_head = head // (H // K)
    q_ptr = inputs[0] + start * strides[0] + head * strides[1]
    k_ptr = inputs[1] + start * strides[2] + key_head * strides[3]
    v_ptr = inputs[2] + start * strides[4] + key_head * strides[5]
    row = first + tl.arange(0, ROWS)
    q = _load_tile(q_ptr, strides[0], row, S, E, PADDED, False, EVEN)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    for begin in tl.range(0, tl.minimum(first + ROWS, S), COLUMNS, num_stages=NUM_STAGES):
        column = begin + tl.arange(0, COLUMNS)
        k = _load_tile(k_ptr, strides[2], column, S, E, PADDED, False, EVEN)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        if begin + COLUMNS > first:
            qk = tl.where(column[None, :] <= row[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(qk * scale_log2 - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc *= alpha[:, None]
        if generator_ptr is not None:
            query, key = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
            keep = keep_weights(generator_ptr, head, start + first, query, begin, key, DROPPED)
            p = tl.where(keep, p, 0.0)
        v = _load_tile(v_ptr, strides[4], column, S, E, PADDED, False, EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new
    in_rows = row < S
    tl.store(lse_ptr + head * n_rows + start + row, m_i + tl.log2(l_i), mask=in_rows)
    columns, in_head = _head_columns(E, PADDED, False)
    out = acc / l_i[:, None]
    if generator_ptr is not None:
        out *= 1 / (1 - DROPPED / 2**32)
    tl.store(
        out_ptr + start * (H * E) + head * E + (row[:, None] * (H * E) + columns[None, :]),
        out.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_head[None, :],
    )  # fmt: skip


@triton.jit
def attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    row_stride,
    head_stride,
    rows,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta of R heads, in the order of rows and within a row of heads."""
    index = tl.program_id(0) * R + tl.arange(0, R)
    row = index // H
    head = index - row * H
    in_rows = row < rows
    column = tl.arange(0, BLOCK)[None, :]
    mask = in_rows[:, None] & (column < E)
    row64 = row.to(tl.int64)
    at_dout = (row64 * row_stride + head * head_stride)[:, None] + column
    at_out = (row64 * (H * E) + head * E)[:, None] + column
    dout = tl.load(dout_ptr + at_dout, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head * rows + row, tl.sum(dout * out, 1), mask=in_rows)


@triton.jit
def _store_rotated_back(
    ptr, gradient, cos_ptr, sin_ptr, position, S,
    C: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The gradient of a head before its rotation, from a tile (positions, PADDED) of the one after
    it; each half is padded where pairs are not neighbours."""
    P: tl.constexpr = E // 2
    BLOCK: tl.constexpr = PADDED // 2
    if INTERLEAVED:
        first, second = tl.split(tl.reshape(gradient, (gradient.shape[0], BLOCK, 2)))
    else:
        halves = tl.reshape(gradient, (gradient.shape[0], 2, BLOCK))
        first, second = tl.split(tl.permute(halves, (0, 2, 1)))
    position = position[:, None]
    in_rows = position < S
    cos, sin = load_angles(cos_ptr, sin_ptr, position, in_rows, S, P, BLOCK)
    store_pairs(
        ptr, position * C, in_rows, first * cos + second * sin, second * cos - first * sin,
        P, BLOCK, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _keys_backward(
    first, key_head, start, inputs, strides, lse_ptr, delta_ptr, tables, dqkv_ptr,
    n_rows, S, scale, scale_log2, generator_ptr,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN: tl.constexpr, NUM_STAGES: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys: all heads of their group, all queries that see them. Scores are
    transposed, (keys, queries), so that what follows reads them from registers."""
    C: tl.constexpr = (H + 2 * K) * E
    G: tl.constexpr = H // K
    HALVES: tl.constexpr = not INTERLEAVED
    key = first + tl.arange(0, ROWS)
    k_ptr = inputs[1] + start * strides[2] + key_head * strides[3]
    v_ptr = inputs[2] + start * strides[4] + key_head * strides[5]
    k = _load_tile(k_ptr, strides[2], key, S, E, PADDED, HALVES, EVEN)
    v = _load_tile(v_ptr, strides[4], key, S, E, PADDED, False, EVEN)
    dk = tl.zeros([ROWS, PADDED], tl.float32)
    dv = tl.zeros([ROWS, PADDED], tl.float32)
    keep_scale: tl.constexpr = 1 / (1 - DROPPED / 2**32)
    seen_from = first // STEP * STEP
    steps = tl.cdiv(S - seen_from, STEP)
    for step in tl.range(0, G * steps, num_stages=NUM_STAGES):
        member = step // steps if G > 1 else 0
        head = key_head * G + member
        begin = seen_from + (step - member * steps) * STEP
        query = begin + tl.arange(0, STEP)
        q_ptr = inputs[0] + start * strides[0] + head * strides[1]
        dout_ptr = inputs[3] + start * strides[6] + head * strides[7]
        numbers = head * n_rows + start
        lse = _load_numbers(lse_ptr + numbers, query, S, EVEN)
        q = _load_tile(q_ptr, strides[0], query, S, E, PADDED, HALVES, EVEN)
        dout = _load_tile(dout_ptr, strides[6], query, S, E, PADDED, False, EVEN)
        delta = _load_numbers(delta_ptr + numbers, query, S, EVEN)
        kq = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        p = tl.exp2(kq * scale_log2 - lse[None, :])
        if begin < first + ROWS:
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        if generator_ptr is not None:
            keys, queries = tl.arange(0, ROWS)[:, None], tl.arange(0, STEP)[None, :]
            keep = keep_weights(generator_ptr, head, start + begin, queries, first, keys, DROPPED)
            p = tl.where(keep, p, -p)  # the sign is the mask, which needs no register then
            dv = tl.dot(tl.maximum(p, 0.0).to(dout.dtype), dout, dv, input_precision="ieee")
            ds = p * tl.where(p > 0, dp * keep_scale - delta[None, :], delta[None, :])
        else:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if generator_ptr is not None:
        dv *= keep_scale
    dqkv_ptr += start * C + key_head * E
    _store_rotated_back(
        dqkv_ptr + H * E, dk * scale, tables[0], tables[1], key, S, C, E, PADDED, INTERLEAVED
    )
    column, in_head = _head_columns(E, PADDED, False)
    tl.store(
        dqkv_ptr + (H + K) * E + (key[:, None] * C + column[None, :]),
        dv.to(dqkv_ptr.dtype.element_ty), mask=(key < S)[:, None] & in_head[None, :],
    )  # fmt: skip


@triton.jit
def _queries_backward(
    first, head, start, inputs, strides, lse_ptr, delta_ptr, tables, dqkv_ptr,
    n_rows, S, scale, scale_log2, generator_ptr,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, INTERLEAVED: tl.constexpr, EVEN: tl.constexpr, NUM_STAGES: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """dq of ROWS queries of a head: all keys that they see."""
    C: tl.constexpr = (H + 2 * K) * E
    HALVES: tl.constexpr = not INTERLEAVED
    query = first + tl.arange(0, ROWS)
    key_head = head // (H // K)
    q_ptr = inputs[0] + start * strides[0] + head * strides[1]
    k_ptr = inputs[1] + start * strides[2] + key_head * strides[3]
    v_ptr = inputs[2] + start * strides[4] + key_head * strides[5]
    dout_ptr = inputs[3] + start * strides[6] + head * strides[7]
    numbers = head * n_rows + start
    q = _load_tile(q_ptr, strides[0], query, S, E, PADDED, HALVES, EVEN)
    lse = _load_numbers(lse_ptr + numbers, query, S, EVEN)
    dout = _load_tile(dout_ptr, strides[6], query, S, E, PADDED, False, EVEN)
    delta = _load_numbers(delta_ptr + numbers, query, S, EVEN)
    dq = tl.zeros([ROWS, PADDED], tl.float32)
    keep_scale: tl.constexpr = 1 / (1 - DROPPED / 2**32)
    for begin in tl.range(0, tl.minimum(first + ROWS, S), STEP, num_stages=NUM_STAGES):
        key = begin + tl.arange(0, STEP)
        k = _load_tile(k_ptr, strides[2], key, S, E, PADDED, HALVES, EVEN)
        v = _load_tile(v_ptr, strides[4], key, S, E, PADDED, False, EVEN)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        p = tl.exp2(qk * scale_log2 - lse[:, None])
        if begin + STEP > first:
            p = tl.where(key[None, :] <= query[:, None], p, 0.0)
        if generator_ptr is not None:
            queries, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, STEP)[None, :]
            keep = keep_weights(generator_ptr, head, start + first, queries, begin, keys, DROPPED)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rotated_back(
        dqkv_ptr + start * C + head * E, dq * scale, tables[0], tables[1], query, S, C, E, PADDED,
        INTERLEAVED,
    )  # fmt: skip


@triton.jit
def attention_backward_kernel(
    inputs,
    strides,
    lse_ptr,
    delta_ptr,
    tables,
    dqkv_ptr,
    n_rows,
    S,
    scale: tl.float32,
    scale_log2: tl.float32,
    generator_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """ROWS keys of a head, or ROWS queries of one, and the inverse rotation of their gradients.
    Keys that the most queries see come first, and queries that see the most keys.

    `inputs` are rotated queries and keys, values, and dout; `tables` cosines and sines."""
    blocks = tl.cdiv(S, ROWS)
    in_rank = tl.num_programs(0) // blocks  # B (H + K)
    rank = tl.program_id(0) // in_rank
    index = tl.program_id(0) % in_rank
    keys = in_rank // (H + K) * K
    if index < keys:
        _keys_backward(
            rank * ROWS, index % K, (index // K).to(tl.int64) * S, inputs, strides,
            lse_ptr, delta_ptr, tables, dqkv_ptr, n_rows, S, scale, scale_log2, generator_ptr, H, K,
            E, PADDED, ROWS, STEP, INTERLEAVED, EVEN, NUM_STAGES, DROPPED,
        )  # fmt: skip
    else:
        index -= keys
        _queries_backward(
            (blocks - 1 - rank) * ROWS, index % H, (index // H).to(tl.int64) * S, inputs, strides,
            lse_ptr, delta_ptr, tables, dqkv_ptr, n_rows, S, scale, scale_log2,
            generator_ptr, H, K, E, PADDED, ROWS, STEP, INTERLEAVED, EVEN, NUM_STAGES, DROPPED,
        )  # fmt: skip
