"""Choosing the next token from its row of logits: `onelaunch.engines.sampling`, compiled."""

from __future__ import annotations

import math

import numpy as np

from onelaunch.engines.cpu.layout import DIGITS, Seq, State
from onelaunch.engines.cpu.native.kernels import WIDTH
from onelaunch.engines.cpu.native.vectors import (
    LANES,
    add,
    compiled,
    exp,
    field,
    fma,
    get_f32,
    get_i32,
    get_i64,
    largest_lane,
    load,
    maximum,
    multiply,
    put_f32,
    put_i32,
    put_i64,
    splat,
    store,
    subtract,
    sum_lanes,
)

NOT_FINITE = -2
_SMALLEST_TEMPERATURE = 1e-30
_LARGEST_FLOAT = np.finfo(np.float32).max


@compiled
def sample(state, seq):
    """Put the chosen id in NEXT; NOT_FINITE where the largest logit is no number."""
    vocab = field(state, State.VOCAB)
    row = field(seq, Seq.ROW)
    logits = field(state, State.LOGITS) + field(state, State.LOGITS_ROW) * row
    top, bad = _largest(logits, vocab)
    chosen = NOT_FINITE
    if not bad:
        new = field(seq, Seq.SIZE) - field(seq, Seq.PROMPT)
        scores, best = logits, top
        if field(seq, Seq.ADJUSTED) != 0:
            scores = _adjust(seq, logits, vocab)
            best, bad = _largest(scores, vocab)
        if get_f32(seq + 8 * Seq.TEMPERATURE) == 0.0:
            chosen = _first_equal(scores, vocab, best)
        else:
            uniform = get_f32(field(seq, Seq.UNIFORMS) + 4 * new)
            buffer = field(state, State.CANDIDATES) + row * candidate_bytes(vocab)
            chosen = _draw(seq, scores, vocab, best, uniform, buffer)
        logprobs = field(seq, Seq.LOGPROBS)
        if logprobs != 0:
            put_f32(logprobs + 8 * new, get_f32(logits + 4 * chosen) - top)
            put_f32(logprobs + 8 * new + 4, _sum_of_exponentials(logits, vocab, top))
        tops = field(seq, Seq.N_TOPS)
        if tops != 0:
            _most_likely(logits, vocab, top, field(seq, Seq.TOPS) + 8 * tops * new, tops)
    put_i64(seq + 8 * Seq.NEXT, chosen)


@compiled
def _adjust(seq, logits, vocab):
    """A copy of the logits, which are finite, with bias and penalties, finite as well; its
    address."""
    to, ids = field(seq, Seq.ADJUSTED), field(seq, Seq.IDS)
    whole = vocab // LANES * LANES
    for i in range(0, whole, LANES):
        store(to + 4 * i, load(logits + 4 * i))
    for i in range(whole, vocab):
        put_f32(to + 4 * i, get_f32(logits + 4 * i))
    biases = field(seq, Seq.BIASES)
    for i in range(field(seq, Seq.N_BIASES)):
        at = to + 4 * get_i64(biases + 16 * i)
        put_f32(at, get_f32(at) + get_f32(biases + 16 * i + 8))
    # how often each token of the text is among the new ones; -1 once it has its penalties
    size, counts = field(seq, Seq.SIZE), to + 4 * vocab
    for i in range(size):
        put_i32(counts + 4 * np.int64(get_i32(ids + 4 * i)), 0)
    for i in range(field(seq, Seq.PROMPT), size):
        at = counts + 4 * np.int64(get_i32(ids + 4 * i))
        put_i32(at, get_i32(at) + 1)
    penalty = get_f32(seq + 8 * Seq.PENALTY)
    # in float64, where the product is exact, fused with the sum or not
    frequency = np.float64(get_f32(seq + 8 * Seq.FREQUENCY))
    presence = np.float64(get_f32(seq + 8 * Seq.PRESENCE))
    for i in range(size):
        token = np.int64(get_i32(ids + 4 * i))
        count = get_i32(counts + 4 * token)
        if count >= 0:
            put_i32(counts + 4 * token, -1)
            value = get_f32(to + 4 * token)
            if value > 0.0:
                value = min(value / penalty, _LARGEST_FLOAT)
            else:
                value = max(value * penalty, -_LARGEST_FLOAT)
            if count > 0:
                value -= np.float32(count * frequency + presence)
            put_f32(to + 4 * token, value)
    return to


@compiled
def _most_likely(logits, vocab, top, to, n):
    """The ids and logits of the n largest, less the largest, in order; of equal ones the first."""
    count = 0
    for i in range(vocab):
        value = get_f32(logits + 4 * i) - top
        if count == n:
            if value <= get_f32(to + 8 * (n - 1) + 4):
                continue
        else:
            count += 1
        at = to + 8 * (count - 1)
        while at > to and get_f32(at - 4) < value:
            put_i64(at, get_i64(at - 8))
            at -= 8
        put_i32(at, i)
        put_f32(at + 4, value)


@compiled
def _sum_of_exponentials(logits, n, top):
    """Of n floats less the largest."""
    shift, sums = splat(top), splat(0.0)
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        sums = add(sums, exp(subtract(load(logits + 4 * i), shift)))
    total = sum_lanes(sums)
    for i in range(whole, n):
        total += largest_lane(exp(subtract(splat(get_f32(logits + 4 * i)), shift)))
    return total


@compiled
def candidate_bytes(vocab):
    """What one sequence's draw needs: weights and ids twice, and a histogram."""
    return 16 * (vocab + LANES) + 8 * DIGITS


@compiled
def _largest(logits, n):
    """The largest of n floats, and whether any of them is not finite."""
    zero = splat(0.0)
    best_a = best_b = splat(-math.inf)
    bad_a = bad_b = zero
    twice = n // (2 * LANES) * (2 * LANES)
    for i in range(0, twice, 2 * LANES):
        a, b = load(logits + 4 * i), load(logits + 4 * i + WIDTH)
        best_a, best_b = maximum(best_a, a), maximum(best_b, b)
        bad_a, bad_b = fma(a, zero, bad_a), fma(b, zero, bad_b)  # 0 inf and 0 nan are nan
    top, bad = largest_lane(maximum(best_a, best_b)), sum_lanes(add(bad_a, bad_b))
    for i in range(twice, n):
        value = get_f32(logits + 4 * i)
        top = max(top, value)
        bad += value * np.float32(0.0)
    return top, bad != np.float32(0.0)


@compiled
def _first_equal(logits, n, value):
    """The first of n floats that equals `value`."""
    i = 0
    while i + 4 * LANES <= n:
        at = logits + 4 * i
        a, b = (
            maximum(load(at), load(at + WIDTH)),
            maximum(load(at + 2 * WIDTH), load(at + 3 * WIDTH)),
        )
        if largest_lane(maximum(a, b)) == value:
            break
        i += 4 * LANES
    while i < n and get_f32(logits + 4 * i) != value:
        i += 1
    return i


@compiled
def _draw(seq, logits, vocab, top, uniform, buffer):
    weights, ids = buffer, buffer + 4 * (vocab + LANES)
    temperature = max(get_f32(seq + 8 * Seq.TEMPERATURE), np.float32(_SMALLEST_TEMPERATURE))
    inverse, shift = splat(np.float32(1.0) / temperature), splat(top)
    whole = vocab // LANES * LANES
    sums = splat(0.0)
    for i in range(0, whole, LANES):
        values = exp(multiply(subtract(load(logits + 4 * i), shift), inverse))
        store(weights + 4 * i, values)
        sums = add(sums, values)
    total = np.float64(sum_lanes(sums))
    for i in range(whole, vocab):
        difference = subtract(splat(get_f32(logits + 4 * i)), shift)
        value = largest_lane(exp(multiply(difference, inverse)))
        put_f32(weights + 4 * i, value)
        total += value
    k = field(seq, Seq.TOP_K)
    top_p = get_f32(seq + 8 * Seq.TOP_P)
    floor = get_f32(seq + 8 * Seq.MIN_P)
    if k == 0 and top_p >= 1.0 and floor == 0.0:
        return _invert(weights, ids, vocab, uniform * total, False)
    if k == 0:
        k = vocab
    # what certainly falls is not sorted; the total that top_p is a share of counts it
    certain = floor
    if k >= vocab and top_p < 1.0:
        certain = max(floor, np.float32(0.5 * (1.0 - top_p) * total / vocab))
    n, total = 0, 0.0
    for i in range(vocab):
        value = get_f32(weights + 4 * i)
        if value >= floor:
            total += value
            if value >= certain:
                put_f32(weights + 4 * n, value)
                put_i32(ids + 4 * n, i)
                n += 1
    size = 4 * (vocab + LANES)
    _sort(weights, ids, n, buffer + 2 * size, buffer + 3 * size, buffer + 4 * size)
    if k < vocab:
        n = min(n, k)
        total = 0.0
        for i in range(n):
            total += get_f32(weights + 4 * i)
    kept = 0.0
    if top_p < 1.0:
        limit = 0
        while limit < n and (limit == 0 or kept < top_p * total):
            kept += get_f32(weights + 4 * limit)
            limit += 1
        n = limit
    else:
        for i in range(n):
            kept += get_f32(weights + 4 * i)
    return _invert(weights, ids, n, uniform * kept, True)


@compiled
def _invert(weights, ids, n, target, sorted_ids):
    """The first candidate whose cumulative weight exceeds `target`."""
    reached, last = 0.0, 0
    for i in range(n):
        value = get_f32(weights + 4 * i)
        if value > 0.0:
            last = i
        reached += value
        if reached > target:
            last = i
            break
    return np.int64(get_i32(ids + 4 * last)) if sorted_ids else last


@compiled
def _sort(weights, ids, n, spare, spare_ids, counts):
    """Weights downwards, equal ones in the order they have: a radix sort of their bits, which for
    floats that are not negative stand in the order of the numbers."""
    for digit in range(4):  # an even number: the result ends where it began
        for i in range(DIGITS):
            put_i64(counts + 8 * i, 0)
        for i in range(n):
            d = 255 - ((get_i32(weights + 4 * i) >> (8 * digit)) & 255)
            put_i64(counts + 8 * d, get_i64(counts + 8 * d) + 1)
        start = 0
        for i in range(DIGITS):
            count = get_i64(counts + 8 * i)
            put_i64(counts + 8 * i, start)
            start += count
        for i in range(n):
            bits = get_i32(weights + 4 * i)
            d = 255 - ((bits >> (8 * digit)) & 255)
            at = get_i64(counts + 8 * d)
            put_i64(counts + 8 * d, at + 1)
            put_i32(spare + 4 * at, bits)
            put_i32(spare_ids + 4 * at, get_i32(ids + 4 * i))
        weights, spare = spare, weights
        ids, spare_ids = spare_ids, ids
