"""What attention takes in a later chunk of a prompt: its keys and values into the cache, and its
queries over the cache.

A chunk is rows of one sequence. Where it lies is data on the device, so that one CUDA graph serves
every chunk of a length, of every prompt and session: `positions`, (N,), int32, rows that stand
behind the prompt having its last position; and `place`, (4,), int64: the addresses of keys and
values, (L, K, context, E) each, and how many vectors of E numbers there are from one layer and from
one head to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.decoding.kernels import wait

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _cached(place_ptr, which: tl.constexpr, layer, head, like_ptr, E: tl.constexpr):
    """A pointer to a head's keys (0) or values (1) of a layer, (context, E), of the type of
    `like_ptr`."""
    cache_ptr = tl.load(place_ptr + which).to(like_ptr.dtype)
    if E * like_ptr.dtype.element_ty.primitive_bitwidth % 128 == 0:
        cache_ptr = tl.multiple_of(cache_ptr, 16)
    vectors = layer * tl.load(place_ptr + 2) + head * tl.load(place_ptr + 3)
    return cache_ptr + vectors * E


@triton.jit(do_not_specialize=("layer", "n_rows"), repr=lambda s: "prompt_store")
def store_kernel(
    qkv_ptr, positions_ptr, place_ptr, layer, n_rows,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Keys and values of qkv, (N, (H + 2 K) E), into the cache: of one head BM rows a CTA. Rows
    behind the prompt are not stored."""
    N: tl.constexpr = (H + 2 * K) * E
    head = tl.program_id(0) % K
    rows = tl.program_id(0) // K * BM + tl.arange(0, BM)
    element = tl.arange(0, PADDED)
    wait(MODE)
    first = tl.load(positions_ptr)
    positions = tl.load(positions_ptr + rows, mask=rows < n_rows, other=-1)
    mask = (positions == first + rows)[:, None] & (element < E)[None, :]
    k_at = qkv_ptr + rows.to(tl.int64)[:, None] * N + (H + head) * E + element[None, :]
    k = tl.load(k_at, mask=mask, other=0.0, cache_modifier=".cg")
    v = tl.load(k_at + K * E, mask=mask, other=0.0, cache_modifier=".cg")
    to = positions.to(tl.int64)[:, None] * E + element[None, :]
    tl.store(_cached(place_ptr, 0, layer, head, qkv_ptr, E) + to, k, mask=mask)
    tl.store(_cached(place_ptr, 1, layer, head, qkv_ptr, E) + to, v, mask=mask)


@triton.jit
def _attend(
    q, keys_ptr, values_ptr, start, last, positions, scale_log2, m_i, l_i, acc,
    E: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """One more block of keys, from `start` up to `last`; with ALL_SEEN every row sees all of it."""
    keys = start + tl.arange(0, BN)
    element = tl.arange(0, PADDED)
    within = keys[:, None] * E + element[None, :]
    in_head = element < E
    if ALL_SEEN and PADDED == E:
        k = tl.load(keys_ptr + within, cache_modifier=".cg")
        v = tl.load(values_ptr + within, cache_modifier=".cg")
    else:
        mask = in_head[None, :]
        if not ALL_SEEN:  # what was not written may be a NaN, and 0 times NaN is NaN
            mask = (keys < last)[:, None] & mask
        k = tl.load(keys_ptr + within, mask=mask, other=0.0, cache_modifier=".cg")
        v = tl.load(values_ptr + within, mask=mask, other=0.0, cache_modifier=".cg")
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    if not ALL_SEEN:
        qk = tl.where(keys[None, :] <= positions[:, None], qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(qk * scale_log2 - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i, acc


@triton.jit(do_not_specialize=("layer", "n_rows"), repr=lambda s: "prompt_attention")
def attention_kernel(
    qkv_ptr, attn_out_ptr, positions_ptr, place_ptr, layer, n_rows, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, NUM_STAGES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """attn_out: (N, H E) = softmax(q k^T scale) v over the cache up to each row's position, with an
    online softmax (2205.14135): of one head BM rows a CTA, the last rows, which see most, first. Of
    a tile behind the prompt nothing is written."""
    N: tl.constexpr = (H + 2 * K) * E
    head = tl.program_id(0) % H
    row = (tl.cdiv(n_rows, BM) - 1 - tl.program_id(0) // H) * BM
    rows = row + tl.arange(0, BM)
    in_rows = rows < n_rows
    element = tl.arange(0, PADDED)
    wait(MODE)
    positions = tl.load(positions_ptr + rows, mask=in_rows, other=0)
    first = tl.load(positions_ptr + row)
    if first == tl.load(positions_ptr) + row:
        mask = in_rows[:, None] & (element < E)[None, :]
        within = head * E + element[None, :]
        q_at = qkv_ptr + rows.to(tl.int64)[:, None] * N + within
        q = tl.load(q_at, mask=mask, other=0.0, cache_modifier=".cg")
        keys_ptr = _cached(place_ptr, 0, layer, head // (H // K), qkv_ptr, E)
        values_ptr = _cached(place_ptr, 1, layer, head // (H // K), qkv_ptr, E)
        scale_log2 = scale * _LOG2E
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, PADDED], tl.float32)
        last = tl.max(positions, 0) + 1
        seen = first // BN * BN
        for start in tl.range(0, seen, BN, num_stages=NUM_STAGES):
            m_i, l_i, acc = _attend(
                q, keys_ptr, values_ptr, start, last, positions, scale_log2, m_i, l_i, acc,
                E, PADDED, BN, True,
            )  # fmt: skip
        for start in tl.range(seen, last, BN, num_stages=NUM_STAGES):
            m_i, l_i, acc = _attend(
                q, keys_ptr, values_ptr, start, last, positions, scale_log2, m_i, l_i, acc,
                E, PADDED, BN, False,
            )  # fmt: skip
        attn_out = (acc / l_i[:, None]).to(attn_out_ptr.dtype.element_ty)
        to = attn_out_ptr + rows.to(tl.int64)[:, None] * (H * E) + within
        tl.store(to, attn_out, mask=mask)
