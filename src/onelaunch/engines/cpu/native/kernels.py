"""The arithmetic of each stage, on a range of rows, heads or tokens: what one item of work does.

Weight matrices lie in the order in which they are read: groups of TILE rows, in a group LANES
columns of each row after one another, padded with zeros to whole groups and to PAD columns. A
thread reads one stream of memory, not one for each row.
"""

from __future__ import annotations

import math

import numpy as np

from onelaunch.engines.cpu.layout import PAD, QUERIES, Layer, PrefetchTo, Seq, State, Token
from onelaunch.engines.cpu.native.tiles import make_tile
from onelaunch.engines.cpu.native.vectors import (
    LANES,
    LOCALITY_L2,
    LOCALITY_ONCE,
    REGISTERS,
    add,
    compiled,
    divide,
    exp,
    field,
    first_lanes,
    fma,
    get_f32,
    largest_lane,
    load,
    load_halves,
    maximum,
    multiply,
    prefetch_to_write,
    put_f32,
    splat,
    square_root,
    store,
    subtract,
    sum_lanes,
)

WIDTH = 4 * LANES  # bytes of a vector
TILE = 16 if REGISTERS >= 32 else 8  # rows of a matrix taken at once
# Rows of a tile of four tokens: as many accumulators as registers hold.
FOUR_ROWS = 4 if REGISTERS >= 32 else 2
ONE = np.float32(1.0)

_one_f32 = make_tile(TILE, 1)
_l2_f32 = make_tile(TILE, 1, prefetch_locality=LOCALITY_L2)
_once_f32 = make_tile(TILE, 1, prefetch_locality=LOCALITY_ONCE)
_four_f32 = make_tile(FOUR_ROWS, 4)
_one_bf16 = make_tile(TILE, 1, "bfloat16")
_l2_bf16 = make_tile(TILE, 1, "bfloat16", prefetch_locality=LOCALITY_L2)
_once_bf16 = make_tile(TILE, 1, "bfloat16", prefetch_locality=LOCALITY_ONCE)
_four_bf16 = make_tile(FOUR_ROWS, 4, "bfloat16")
_scores_one = make_tile(4, 1, b_kind="scalar", finish="vectors")
_scores_tail = make_tile(1, 1, b_kind="scalar", finish="vectors")
_scores_four = make_tile(2, 4, b_kind="scalar", finish="vectors")
_scores_four_tail = make_tile(1, 4, b_kind="scalar", finish="vectors")
_mix_one = make_tile(8, 1)
_mix_one_tail = make_tile(1, 1)
_mix_four = make_tile(FOUR_ROWS, 4)
_mix_four_tail = make_tile(1, 4)


@compiled
def padded(columns):
    return (columns + PAD - 1) // PAD * PAD


@compiled
def row_bytes(state, columns):
    """Bytes of a weight matrix's row."""
    return padded(columns) * (2 if field(state, State.NARROW) else 4)


@compiled
def token_field(state, token, index):
    return field(field(state, State.TOKENS) + 8 * Token.LENGTH * token, index)


@compiled
def sequence_of(state, token):
    """The Seq that a token belongs to."""
    return field(state, State.SEQUENCES) + 8 * Seq.LENGTH * token_field(
        state, token, Token.SEQUENCE
    )


@compiled
def layer_field(state, layer, index):
    return field(field(state, State.LAYERS) + 8 * Layer.LENGTH * layer, index)


@compiled
def _one_token(state, w, a_row, step, x, n, out, unread):
    """TILE rows of a product with one vector. Weights that no other vector has met before are
    prefetched to the cache that the state names."""
    to = field(state, State.PREFETCH_TO) if unread else PrefetchTo.NONE
    ahead = field(state, State.PREFETCH_AHEAD)
    if field(state, State.NARROW):
        if to == PrefetchTo.L2:
            _l2_bf16(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE, ahead)
        elif to == PrefetchTo.ONCE:
            _once_bf16(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE, ahead)
        else:
            _one_bf16(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE)
    elif to == PrefetchTo.L2:
        _l2_f32(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE, ahead)
    elif to == PrefetchTo.ONCE:
        _once_f32(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE, ahead)
    else:
        _one_f32(w, a_row, step, x, 0, WIDTH, n, out, 0, ONE)


@compiled
def product(state, weights, first, rows, columns, x, x_row, tokens, out):
    """Rows first .. first + rows of weights . x[t], for each t, into out; returns where out[t = 0]
    of the row `first` lies, the others at 4 bytes and OUT_ROW. Whole groups of TILE rows are taken:
    some more results lie before and behind."""
    out_row = field(state, State.OUT_ROW)
    stride = row_bytes(state, columns)
    narrow = field(state, State.NARROW)
    a_row = 2 * LANES if narrow else 4 * LANES
    step = TILE * a_row
    n = padded(columns) // LANES
    fours = tokens // 4 * 4
    before = first % TILE
    w = weights + (first - before) * stride
    for r in range(0, before + rows, TILE):
        target = out + 4 * r
        for t in range(0, fours, 4):
            for half in range(0, TILE, FOUR_ROWS):
                a, b, o = w + half * a_row, x + t * x_row, target + t * out_row + 4 * half
                if narrow:
                    _four_bf16(a, a_row, step, b, x_row, WIDTH, n, o, out_row, ONE)
                else:
                    _four_f32(a, a_row, step, b, x_row, WIDTH, n, o, out_row, ONE)
        for t in range(fours, tokens):
            b, o = x + t * x_row, target + t * out_row
            _one_token(state, w, a_row, step, b, n, o, t == 0)
        w += TILE * stride
    return out + 4 * before


@compiled
def embed(state, token):
    """x[t] = embedding[id]."""
    dim = field(state, State.DIM)
    x = field(state, State.X) + 4 * padded(dim) * token
    row = token_field(state, token, Token.ID)
    narrow = field(state, State.NARROW)
    size = 2 * LANES if narrow else 4 * LANES
    at = field(state, State.EMBEDDING) + row_bytes(state, dim) * (row // TILE * TILE)
    at += row % TILE * size
    for i in range(padded(dim) // LANES):
        values = load_halves(at) if narrow else load(at)
        store(x + WIDTH * i, values)
        at += TILE * size


@compiled
def normalize(state, token, weight, to):
    """to = x[t] / sqrt(mean(x[t]^2) + eps) * weight, zero in the padding."""
    dim = field(state, State.DIM)
    wide = padded(dim)
    x = field(state, State.X) + 4 * wide * token
    total = splat(0.0)
    for i in range(0, wide, LANES):
        values = load(x + 4 * i)
        total = fma(values, values, total)
    eps = get_f32(state + 8 * State.EPS)
    scale = splat(ONE / square_root(sum_lanes(total) / dim + eps))
    for i in range(0, wide, LANES):
        store(to + 4 * i, multiply(multiply(load(x + 4 * i), scale), load(weight + 4 * i)))


@compiled
def _normalize_head(state, head, weight):
    width = field(state, State.HEAD_DIM)
    total = get_f32(head) * get_f32(head)
    for i in range(1, width):
        total += get_f32(head + 4 * i) * get_f32(head + 4 * i)
    scale = ONE / square_root(total / width + get_f32(state + 8 * State.EPS))
    for i in range(width):
        put_f32(head + 4 * i, get_f32(head + 4 * i) * scale * get_f32(weight + 4 * i))


@compiled
def _rotate(state, head, position):
    """Rotary embedding in place."""
    pairs = field(state, State.HEAD_DIM) // 2
    cos = field(state, State.COS) + 4 * pairs * position
    sin = field(state, State.SIN) + 4 * pairs * position
    if field(state, State.INTERLEAVED):
        apart, next_pair = 4, 8
    else:
        apart, next_pair = 4 * pairs, 4
    for i in range(pairs):
        at = head + next_pair * i
        a, b = get_f32(at), get_f32(at + apart)
        c, s = get_f32(cos + 4 * i), get_f32(sin + 4 * i)
        put_f32(at, a * c - b * s)
        put_f32(at + apart, b * c + a * s)


@compiled
def head_cache(state, seq, layer, which, head):
    """Where a head's keys (which = 0) or values (1) begin: blocks of (E, LANES)."""
    size = field(seq, Seq.BLOCKS) * field(state, State.HEAD_DIM) * WIDTH
    index = (2 * layer + which) * field(state, State.KV_HEADS) + head
    return field(seq, Seq.CACHE) + index * size


@compiled
def _cache_slot(state, seq, layer, number, position):
    """Where a position's first element goes; heads of keys are numbered before those of values."""
    kv_heads, width = field(state, State.KV_HEADS), field(state, State.HEAD_DIM)
    to = head_cache(state, seq, layer, number // kv_heads, number % kv_heads)
    return to + (position // LANES) * width * WIDTH + 4 * (position % LANES)


@compiled
def qkv(state, layer, first, heads, x, x_row, scratch):
    """Heads first .. first + heads of q, k and v, numbered in this order, for every token: product,
    bias, QK-norm, rotary embedding; queries to their buffer, keys and values to the cache."""
    n_heads, kv_heads = field(state, State.HEADS), field(state, State.KV_HEADS)
    width, tokens = field(state, State.HEAD_DIM), field(state, State.N_TOKENS)
    weights, bias = layer_field(state, layer, Layer.QKV), layer_field(state, layer, Layer.QKV_BIAS)
    dim = field(state, State.DIM)
    if tokens == 1:
        position = token_field(state, 0, Token.POSITION)
        # a new position touches a cache line for each element: prefetch them before the product
        for h in range(max(first, n_heads), first + heads):
            to = _cache_slot(state, sequence_of(state, 0), layer, h - n_heads, position)
            for e in range(width):
                prefetch_to_write(to + WIDTH * e)
    scratch = product(state, weights, first * width, heads * width, dim, x, x_row, tokens, scratch)
    out_row = field(state, State.OUT_ROW)
    for t in range(tokens):
        position = token_field(state, t, Token.POSITION)
        seq = sequence_of(state, t)
        for h in range(first, first + heads):
            head = scratch + t * out_row + 4 * width * (h - first)
            if bias:
                for e in range(width):
                    its = bias + 4 * (width * h + e)
                    put_f32(head + 4 * e, get_f32(head + 4 * e) + get_f32(its))
            if h < n_heads + kv_heads:
                if field(state, State.QK_NORM):
                    which = Layer.Q_NORM if h < n_heads else Layer.K_NORM
                    _normalize_head(state, head, layer_field(state, layer, which))
                _rotate(state, head, position)
            if h < n_heads:
                query = field(state, State.QUERY) + 4 * width * (n_heads * t + h)
                for e in range(width):
                    put_f32(query + 4 * e, get_f32(head + 4 * e))
            else:
                to = _cache_slot(state, seq, layer, h - n_heads, position)
                for e in range(width):
                    put_f32(to + WIDTH * e, get_f32(head + 4 * e))


@compiled
def attend(state, layer, first, count, head, scores):
    """Causal attention of one head for `count` neighbouring tokens of one sequence."""
    seq = sequence_of(state, first)
    width, n_heads = field(state, State.HEAD_DIM), field(state, State.HEADS)
    kv_head = head // (n_heads // field(state, State.KV_HEADS))
    keys = head_cache(state, seq, layer, 0, kv_head)
    values = head_cache(state, seq, layer, 1, kv_head)
    position = token_field(state, first, Token.POSITION)
    blocks = (position + count - 1) // LANES + 1
    block = width * WIDTH
    scores_row = WIDTH * field(seq, Seq.BLOCKS)
    query_row = 4 * width * n_heads
    query = field(state, State.QUERY) + query_row * first + 4 * width * head
    out_row = 4 * padded(width * n_heads)
    out = field(state, State.ATTN_OUT) + out_row * first + 4 * width * head
    scale = ONE / square_root(np.float32(width))
    if count == QUERIES:
        twos = blocks // 2 * 2
        for b in range(0, twos, 2):
            a, o = keys + b * block, scores + b * WIDTH
            _scores_four(a, block, WIDTH, query, query_row, 4, width, o, scores_row, scale)
        for b in range(twos, blocks):
            a, o = keys + b * block, scores + b * WIDTH
            _scores_four_tail(a, block, WIDTH, query, query_row, 4, width, o, scores_row, scale)
    else:
        fours = blocks // 4 * 4
        for t in range(count):
            q = query + t * query_row
            s = scores + t * scores_row
            for b in range(0, fours, 4):
                _scores_one(keys + b * block, block, WIDTH, q, 0, 4, width, s + b * WIDTH, 0, scale)
            for b in range(fours, blocks):
                _scores_tail(
                    keys + b * block, block, WIDTH, q, 0, 4, width, s + b * WIDTH, 0, scale
                )
    for t in range(count):
        _softmax(scores + t * scores_row, position + t + 1, blocks)
    if count == QUERIES:
        fours = width // FOUR_ROWS * FOUR_ROWS
        for e in range(0, fours, FOUR_ROWS):
            _mix_four(
                values + WIDTH * e, WIDTH, block, scores, scores_row, WIDTH, blocks,
                out + 4 * e, out_row, ONE,
            )  # fmt: skip
        for e in range(fours, width):
            _mix_four_tail(
                values + WIDTH * e, WIDTH, block, scores, scores_row, WIDTH, blocks,
                out + 4 * e, out_row, ONE,
            )  # fmt: skip
    else:
        eights = width // 8 * 8
        for t in range(count):
            s, o = scores + t * scores_row, out + t * out_row
            for e in range(0, eights, 8):
                v = values + WIDTH * e
                _mix_one(v, WIDTH, block, s, 0, WIDTH, blocks, o + 4 * e, 0, ONE)
            for e in range(eights, width):
                v = values + WIDTH * e
                _mix_one_tail(v, WIDTH, block, s, 0, WIDTH, blocks, o + 4 * e, 0, ONE)


@compiled
def _softmax(scores, n, blocks):
    """The first n scores as probabilities; zero in the rest of the blocks."""
    whole = n // LANES
    largest = splat(-math.inf)
    for b in range(whole):
        largest = maximum(largest, load(scores + b * WIDTH))
    top = largest_lane(largest)
    for i in range(whole * LANES, n):
        top = max(top, get_f32(scores + 4 * i))
    shift = splat(top)
    total = splat(0.0)
    for b in range(blocks):
        values = exp(subtract(load(scores + b * WIDTH), shift))
        values = first_lanes(values, n - b * LANES)
        store(scores + b * WIDTH, values)
        total = add(total, values)
    scale = splat(ONE / sum_lanes(total))
    for b in range(blocks):
        store(scores + b * WIDTH, multiply(load(scores + b * WIDTH), scale))


@compiled
def add_product(state, weights, first, rows, columns, x, scratch):
    """x[t][first ..] += weights . x_in[t]: out_proj and down with their residual. `first` is a
    multiple of TILE; the matrix is zero behind its last row, and the padding of x stays zero."""
    tokens, dim = field(state, State.N_TOKENS), field(state, State.DIM)
    product(state, weights, first, rows, columns, x, 4 * padded(columns), tokens, scratch)
    out_row = field(state, State.OUT_ROW)
    whole = (rows + TILE - 1) // TILE * TILE
    for t in range(tokens):
        to = field(state, State.X) + 4 * padded(dim) * t + 4 * first
        for r in range(0, whole, LANES):
            store(to + 4 * r, add(load(to + 4 * r), load(scratch + out_row * t + 4 * r)))


@compiled
def gate_up(state, layer, first, rows, x, x_row, scratch):
    """activation[t][first ..] = silu(gate . x) * (up . x). The matrix holds TILE rows of gate, then
    the same TILE rows of up, and so on; `first` is a multiple of TILE. The rows behind the last are
    zero in the matrix, and so in the padding of the result."""
    tokens, hidden = field(state, State.N_TOKENS), field(state, State.HIDDEN)
    weights = layer_field(state, layer, Layer.GATE_UP)
    whole = (rows + TILE - 1) // TILE * TILE
    dim = field(state, State.DIM)
    product(state, weights, 2 * first, 2 * whole, dim, x, x_row, tokens, scratch)
    one, zero = splat(1.0), splat(0.0)
    out_row = field(state, State.OUT_ROW)
    for t in range(tokens):
        to = field(state, State.ACTIVATION) + 4 * padded(hidden) * t + 4 * first
        for r in range(0, whole, TILE):
            at = scratch + out_row * t + 8 * r
            for i in range(0, TILE, LANES):
                gate, up = load(at + 4 * i), load(at + 4 * (TILE + i))
                silu = divide(gate, add(one, exp(subtract(zero, gate))))
                store(to + 4 * (r + i), multiply(silu, up))


@compiled
def head(state, first, rows, x, x_row, tokens, scratch):
    """logits[row][first ..] for the requested rows, in their order."""
    weights = field(state, State.HEAD)
    dim = field(state, State.DIM)
    scratch = product(state, weights, first, rows, dim, x, x_row, tokens, scratch)
    out_row = field(state, State.OUT_ROW)
    for t in range(tokens):
        to = field(state, State.LOGITS) + field(state, State.LOGITS_ROW) * t + 4 * first
        for r in range(0, rows // LANES * LANES, LANES):
            store(to + 4 * r, load(scratch + out_row * t + 4 * r))
        for r in range(rows // LANES * LANES, rows):
            put_f32(to + 4 * r, get_f32(scratch + out_row * t + 4 * r))
