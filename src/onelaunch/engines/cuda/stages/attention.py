"""Attention by a running maximum, whole or in chunks of its keys."""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.stages.common import ready


@triton.jit
def _attend(
    q,
    qkv_ptr,
    start_of_text,
    start,
    last,
    places,
    powers,
    most,
    divisor,
    total,
    key,
    ROW: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_SEEN: tl.constexpr,
):
    """One more block of keys, from `start` up to `last`; with ALL_SEEN every row sees all of it."""
    keys = start + tl.arange(0, BN)
    element = tl.arange(0, WIDTH)
    offsets = (start_of_text + keys) * ROW + key * E
    k_at = qkv_ptr + offsets[None, :] + element[:, None]
    v_at = qkv_ptr + K * E + offsets[:, None] + element[None, :]
    # what comes later may not have been written yet, and 0 times NaN is NaN
    written = keys < last
    if ALL_SEEN and WIDTH == E:
        k = tl.load(k_at, cache_modifier=".cg")
    elif ALL_SEEN:
        k = tl.load(k_at, mask=(element < E)[:, None], other=0.0, cache_modifier=".cg")
    else:
        mask = written[None, :] & (element < E)[:, None]
        k = tl.load(k_at, mask=mask, other=0.0, cache_modifier=".cg")
    scores = tl.dot(q, k, input_precision="ieee")
    if not ALL_SEEN:
        scores = tl.where(keys[None, :] <= places[:, None], scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1) * powers)
    shrunk = tl.exp2(most - higher)
    weights = tl.exp2(scores * powers - higher[:, None])
    divisor = divisor * shrunk + tl.sum(weights, 1)
    if ALL_SEEN and WIDTH == E:
        v = tl.load(v_at, cache_modifier=".cg")
    elif ALL_SEEN:
        v = tl.load(v_at, mask=(element < E)[None, :], other=0.0, cache_modifier=".cg")
    else:
        mask = written[:, None] & (element < E)[None, :]
        v = tl.load(v_at, mask=mask, other=0.0, cache_modifier=".cg")
    total *= shrunk[:, None]
    total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
    return higher, divisor, total


@triton.jit
def _leave(parts_ptr, chunk, most, divisor, total, BM: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk's part: (BM, WIDTH), then the rows' maxima, then their divisors."""
    row = tl.arange(0, BM)
    to = parts_ptr + chunk * (BM * (WIDTH + 2))
    tl.store(to + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], total)
    tl.store(to + BM * WIDTH + row, most)
    tl.store(to + BM * (WIDTH + 1) + row, divisor)


@triton.jit
def _put_together(parts_ptr, chunks, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Divisors and totals of all chunks, added in their order."""
    row = tl.arange(0, BM)
    cells = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    most = tl.full([BM], float("-inf"), tl.float32)
    divisor = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, WIDTH], tl.float32)
    for chunk in tl.range(chunks, num_stages=1):
        at = parts_ptr + chunk * (BM * (WIDTH + 2))
        its_most = tl.load(at + BM * WIDTH + row, cache_modifier=".cg")
        its_divisor = tl.load(at + BM * (WIDTH + 1) + row, cache_modifier=".cg")
        its_total = tl.load(at + cells, cache_modifier=".cg")
        higher = tl.maximum(most, its_most)
        shrunk, grown = tl.exp2(most - higher), tl.exp2(its_most - higher)
        divisor = divisor * shrunk + its_divisor * grown
        total = total * shrunk[:, None] + its_total * grown[:, None]
        most = higher
    return divisor, total


@triton.jit
def attention_tile(
    tile,
    wait,
    qkv_ptr,
    mixed_ptr,
    partial_ptr,
    arrived_ptr,
    sequence,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    LOADS: tl.constexpr,
    MODE: tl.constexpr,
):
    """One head for BM rows of one text: softmax(q k^T scale) v over what each row sees, with a
    running maximum (2205.14135). WIDTH is the power of two from 16 on that holds E.

    With CHUNK the tiles are cut further, into chunks of so many keys, a multiple of BM: the last
    chunks of all tiles, then those before, so that run from behind the largest come first. Each
    leaves its part, and the last one to arrive puts them together in their order: the bits are
    always the same ones."""
    tiles_of_text = tl.cdiv(sequence, BM)
    begin = 0
    if CHUNK > 0:
        most_chunks = tl.cdiv(sequence, CHUNK)
        tiles = tl.num_programs(0) // most_chunks
        chunk = most_chunks - 1 - tile // tiles
        tile = tile % tiles
        begin = chunk * CHUNK
    head = tile % H
    text = tile // H // tiles_of_text
    first = tile // H % tiles_of_text * BM
    last = tl.minimum(first + BM, sequence)
    end = last
    if CHUNK > 0:
        end = tl.minimum(begin + CHUNK, last)
    key = H + head // (H // K)  # the key's head in qkv; its value's is K further
    row: tl.constexpr = (H + 2 * K) * E
    places = first + tl.arange(0, BM)
    element = tl.arange(0, WIDTH)
    start_of_text = text.to(tl.int64) * sequence
    rows = (start_of_text + places)[:, None]
    within = head * E + element[None, :]
    q_mask = (places < sequence)[:, None] & (element < E)[None, :]
    ready(wait, MODE)
    if begin < last:
        q = tl.load(qkv_ptr + rows * row + within, mask=q_mask, other=0.0, cache_modifier=".cg")
        powers = scale * 1.4426950408889634  # of two: 1 / log(2)
        most = tl.full([BM], float("-inf"), tl.float32)
        divisor = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, WIDTH], tl.float32)
        start = begin
        if CHUNK > 0:
            start += tl.maximum(tl.minimum(first + 1, end) - begin, 0) // BN * BN
            for at in tl.range(begin, start, BN, num_stages=LOADS):
                most, divisor, total = _attend(
                    q, qkv_ptr, start_of_text, at, end, places, powers, most, divisor, total, key,
                    row, K, E, BN, WIDTH, True,
                )  # fmt: skip
        for at in tl.range(start, end, BN, num_stages=LOADS):
            most, divisor, total = _attend(
                q, qkv_ptr, start_of_text, at, end, places, powers, most, divisor, total, key, row,
                K, E, BN, WIDTH, False,
            )  # fmt: skip
        whole = True
        if CHUNK > 0:
            chunks = tl.cdiv(last, CHUNK)
            if chunks > 1:
                partial_ptr += tile.to(tl.int64) * (most_chunks * (BM * (WIDTH + 2)))
                _leave(partial_ptr, chunk, most, divisor, total, BM, WIDTH)
                tl.debug_barrier()
                before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
                whole = before == chunks - 1
                if whole:
                    tl.debug_barrier()
                    divisor, total = _put_together(partial_ptr, chunks, BM, WIDTH)
                    tl.store(arrived_ptr + tile, 0)
        if whole:
            mixed = (total / divisor[:, None]).to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + rows * (H * E) + within, mixed, mask=q_mask)
