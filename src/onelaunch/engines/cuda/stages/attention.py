"""Attention with an online softmax, whole or in chunks of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from onelaunch.engines.cuda.blocking import padded
from onelaunch.engines.cuda.stages.binding import Bound, Sources
from onelaunch.engines.cuda.stages.common import WITHIN_SEQUENCES, constant, ready


@dataclass(frozen=True)
class Extents:
    """PADDED is the power of two from 16 on that holds E; CHUNK, keys, a multiple of BM, or 0."""

    H: int
    K: int
    E: int
    PADDED: int
    BM: int
    BN: int
    CHUNK: int
    NUM_STAGES: int


class Operands(NamedTuple):
    """qkv: (N, (H + 2 K) E) of each layer; attn_out: (N, H E); of attention in chunks, where each
    leaves its partial result, and how many have arrived of each tile: (tiles,), int32, zeros."""

    qkv: Any
    attn_out: Any
    partial: Any
    arrived: Any
    scale: Any
    extents: Any


@triton.jit
def _attend(
    q,
    qkv_ptr,
    start_of_sequence,
    start,
    last,
    positions,
    scale_log2,
    m_i,
    l_i,
    acc,
    key,
    c: tl.constexpr,
    ALL_SEEN: tl.constexpr,
):
    """One more block of keys, from `start` up to `last`; with ALL_SEEN every row sees all of it."""
    row: tl.constexpr = (c.H + 2 * c.K) * c.E
    keys = start + tl.arange(0, c.BN)
    element = tl.arange(0, c.PADDED)
    offsets = (start_of_sequence + keys) * row + key * c.E
    k_at = qkv_ptr + offsets[None, :] + element[:, None]
    v_at = qkv_ptr + c.K * c.E + offsets[:, None] + element[None, :]
    # what comes later may not have been written yet, and 0 times NaN is NaN
    written = keys < last
    if ALL_SEEN and c.PADDED == c.E:
        k = tl.load(k_at, cache_modifier=".cg")
    elif ALL_SEEN:
        k = tl.load(k_at, mask=(element < c.E)[:, None], other=0.0, cache_modifier=".cg")
    else:
        mask = written[None, :] & (element < c.E)[:, None]
        k = tl.load(k_at, mask=mask, other=0.0, cache_modifier=".cg")
    qk = tl.dot(q, k, input_precision="ieee")
    if not ALL_SEEN:
        qk = tl.where(keys[None, :] <= positions[:, None], qk, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(qk * scale_log2 - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    if ALL_SEEN and c.PADDED == c.E:
        v = tl.load(v_at, cache_modifier=".cg")
    elif ALL_SEEN:
        v = tl.load(v_at, mask=(element < c.E)[None, :], other=0.0, cache_modifier=".cg")
    else:
        mask = written[:, None] & (element < c.E)[None, :]
        v = tl.load(v_at, mask=mask, other=0.0, cache_modifier=".cg")
    acc *= alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def _store_chunk(partial_ptr, chunk, m_i, l_i, acc, BM: tl.constexpr, PADDED: tl.constexpr):
    """A chunk's result: acc, (BM, PADDED), then the rows' m_i, then their l_i."""
    row = tl.arange(0, BM)
    to = partial_ptr + chunk * (BM * (PADDED + 2))
    tl.store(to + row[:, None] * PADDED + tl.arange(0, PADDED)[None, :], acc)
    tl.store(to + BM * PADDED + row, m_i)
    tl.store(to + BM * (PADDED + 1) + row, l_i)


@triton.jit
def _merge_chunks(partial_ptr, chunks, BM: tl.constexpr, PADDED: tl.constexpr):
    """l_i and acc of all chunks, added in their order."""
    row = tl.arange(0, BM)
    cells = row[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, PADDED], tl.float32)
    for chunk in tl.range(chunks, num_stages=1):
        at = partial_ptr + chunk * (BM * (PADDED + 2))
        m_chunk = tl.load(at + BM * PADDED + row, cache_modifier=".cg")
        l_chunk = tl.load(at + BM * (PADDED + 1) + row, cache_modifier=".cg")
        acc_chunk = tl.load(at + cells, cache_modifier=".cg")
        m_new = tl.maximum(m_i, m_chunk)
        alpha, beta = tl.exp2(m_i - m_new), tl.exp2(m_chunk - m_new)
        l_i = l_i * alpha + l_chunk * beta
        acc = acc * alpha[:, None] + acc_chunk * beta[:, None]
        m_i = m_new
    return l_i, acc


@triton.jit
def attention_tile(tile_id, o, run, wait):
    """One head for BM rows of one sequence: softmax(q k^T scale) v over what each row sees, with an
    online softmax (2205.14135).

    With CHUNK the tiles are cut further, into chunks of so many keys: the last chunks of all tiles,
    then those before, so that run from behind the largest come first. Each stores its result, and
    the last one to arrive merges them in their order: the bits are always the same ones."""
    c: tl.constexpr = o.extents
    BM: tl.constexpr = c.BM
    PADDED: tl.constexpr = c.PADDED
    sequence = run.sequence
    tiles_of_sequence = tl.cdiv(sequence, BM)
    begin = 0
    if c.CHUNK > 0:
        max_chunks = tl.cdiv(sequence, c.CHUNK)
        tiles = tl.num_programs(0) // max_chunks
        chunk = max_chunks - 1 - tile_id // tiles
        tile_id = tile_id % tiles
        begin = chunk * c.CHUNK
    head = tile_id % c.H
    number = tile_id // c.H // tiles_of_sequence
    first = tile_id // c.H % tiles_of_sequence * BM
    last = tl.minimum(first + BM, sequence)
    end = last
    if c.CHUNK > 0:
        end = tl.minimum(begin + c.CHUNK, last)
    key = c.H + head // (c.H // c.K)  # the key's head in qkv; its value's is K further
    row: tl.constexpr = (c.H + 2 * c.K) * c.E
    positions = first + tl.arange(0, BM)
    element = tl.arange(0, PADDED)
    start_of_sequence = number.to(tl.int64) * sequence
    rows = (start_of_sequence + positions)[:, None]
    within = head * c.E + element[None, :]
    q_mask = (positions < sequence)[:, None] & (element < c.E)[None, :]
    qkv_ptr = o.qkv + run.layer * row * run.n_rows
    ready(wait)
    if begin < last:
        q = tl.load(qkv_ptr + rows * row + within, mask=q_mask, other=0.0, cache_modifier=".cg")
        scale_log2 = o.scale * 1.4426950408889634  # 1 / log(2)
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, PADDED], tl.float32)
        start = begin
        if c.CHUNK > 0:
            start += tl.maximum(tl.minimum(first + 1, end) - begin, 0) // c.BN * c.BN
            for at in tl.range(begin, start, c.BN, num_stages=c.NUM_STAGES):
                m_i, l_i, acc = _attend(
                    q, qkv_ptr, start_of_sequence, at, end, positions, scale_log2, m_i, l_i, acc,
                    key, c, True,
                )  # fmt: skip
        for at in tl.range(start, end, c.BN, num_stages=c.NUM_STAGES):
            m_i, l_i, acc = _attend(
                q, qkv_ptr, start_of_sequence, at, end, positions, scale_log2, m_i, l_i, acc, key,
                c, False,
            )  # fmt: skip
        whole = True
        if c.CHUNK > 0:
            chunks = tl.cdiv(last, c.CHUNK)
            if chunks > 1:
                partial_ptr = o.partial + tile_id.to(tl.int64) * (max_chunks * (BM * (PADDED + 2)))
                _store_chunk(partial_ptr, chunk, m_i, l_i, acc, BM, PADDED)
                tl.debug_barrier()
                before = tl.atomic_add(o.arrived + tile_id, 1, sem="acq_rel", scope="gpu")
                whole = before == chunks - 1
                if whole:
                    tl.debug_barrier()
                    l_i, acc = _merge_chunks(partial_ptr, chunks, BM, PADDED)
                    tl.store(o.arrived + tile_id, 0)
        if whole:
            attn_out = (acc / l_i[:, None]).to(o.attn_out.dtype.element_ty)
            tl.store(o.attn_out + rows * (c.H * c.E) + within, attn_out, mask=q_mask)


def bind(s: Sources, kind: str, layer: int | None) -> Bound:
    """attention with its operands, in chunks where there are `s.chunks`."""
    c, b, blocking = s.config, s.buffers, s.blockings[kind]
    chunk = 0 if s.chunks is None else blocking.chunk
    partial, arrived = (None, None) if s.chunks is None else (s.chunks.partial, s.chunks.arrived)
    extents = Extents(
        c.n_heads, c.n_kv_heads, c.head_dim, padded(c.head_dim), blocking.rows,
        blocking.columns, chunk, blocking.num_stages,
    )  # fmt: skip
    scale = c.head_dim**-0.5
    operands = Operands(s.qkv(layer), b.attn_out, partial, arrived, scale, constant(extents))
    return Bound(attention_tile, operands, s.cut(kind, WITHIN_SEQUENCES), backwards=True)
