"""One item of each kind of work; see `layout.Kind`.

Between two attentions a token meets no other: all that is done to it there is one stage, whose
intermediate results stay in the nearest caches.
"""

from __future__ import annotations

import math

import numpy as np

from onelaunch.engines.cpu.native.training import rows
from onelaunch.engines.cpu.native.training.attention import attend, attend_backward, dot
from onelaunch.engines.cpu.native.training.products import (
    BLOCK,
    ROW,
    WIDTH,
    weigh,
    weigh_back,
)
from onelaunch.engines.cpu.native.vectors import (
    add,
    compiled,
    divide,
    exp,
    field,
    fma,
    get_f32,
    get_i64,
    load,
    maximum,
    multiply,
    put_f32,
    splat,
    square_root,
    store,
    subtract,
)
from onelaunch.engines.cpu.training.layout import PANEL_FLOATS, Layer, Operation, Step

ONE = np.float32(1.0)
VOCAB_ROWS = 384  # of the head, whose logits are looked at while they are near


@compiled
def layer_field(step, layer, index):
    return field(field(step, Step.LAYERS) + 8 * Layer.LENGTH * layer, index)


@compiled
def q_dim(step):
    return field(step, Step.HEADS) * field(step, Step.HEAD_DIM)


@compiled
def kv_dim(step):
    return field(step, Step.KV_HEADS) * field(step, Step.HEAD_DIM)


@compiled
def panel_of(step, scratch):
    """Room for `weigh_back` at the end of a thread's scratch."""
    return scratch + field(step, Step.SCRATCH_SIZE) - 4 * PANEL_FLOATS


@compiled
def block_of(matrix, features, block):
    """Where a block of tokens lies in a matrix of activations."""
    return matrix + block * features * ROW


@compiled
def _item_blocks(step, item):
    """How many blocks an item of rows has; its first is item * ITEM_BLOCKS."""
    size = field(step, Step.ITEM_BLOCKS)
    return min(size, field(step, Step.BLOCKS) - item * size)


@compiled
def forward_rows(step, layer, item, scratch):
    """From the attention of layer - 1 to that of `layer`; from the tokens to layer 0."""
    first = item * field(step, Step.ITEM_BLOCKS)
    n = _item_blocks(step, item)
    if layer == 0:
        _embed(step, first, n)
    else:
        _behind_attention(step, layer - 1, first, n, scratch)
    if layer < field(step, Step.N_LAYERS):
        _before_attention(step, layer, first, n, scratch)


@compiled
def input_of(step, layer):
    """The input of a layer; what the last one puts out, for the layer behind it."""
    if layer < field(step, Step.N_LAYERS):
        return layer_field(step, layer, Layer.X)
    return field(step, Step.X_LAST)


@compiled
def _embed(step, first, n):
    dim = field(step, Step.DIM)
    tokens = field(step, Step.TOKENS)
    embedding = field(step, Step.EMBEDDING)
    x = input_of(step, 0)
    for b in range(first, first + n):
        for t in range(BLOCK):
            row = embedding + 4 * dim * get_i64(tokens + 8 * (b * BLOCK + t))
            to = block_of(x, dim, b) + 4 * t
            for i in range(dim):
                put_f32(to + i * ROW, get_f32(row + 4 * i))


@compiled
def _before_attention(step, layer, first, n, scratch):
    """Norm, queries, keys and values, their norms, rotary embedding."""
    dim, width = field(step, Step.DIM), field(step, Step.HEAD_DIM)
    heads, kv_heads = field(step, Step.HEADS), field(step, Step.KV_HEADS)
    eps = get_f32(step + 8 * Step.EPS)
    features = (heads + 2 * kv_heads) * width
    x = block_of(layer_field(step, layer, Layer.X), dim, first)
    rstd = layer_field(step, layer, Layer.RSTD) + first * ROW
    weight = layer_field(step, layer, Layer.INPUT_NORM)
    for b in range(n):
        normed = scratch + b * dim * ROW
        rows.norm(x + b * dim * ROW, dim, weight, eps, rstd + b * ROW, normed)
    qkv = block_of(layer_field(step, layer, Layer.QKV), features, first)
    size = features * ROW
    k, v = qkv + heads * width * ROW, qkv + (heads + kv_heads) * width * ROW
    w_q, w_k = layer_field(step, layer, Layer.Q), layer_field(step, layer, Layer.K)
    w_v = layer_field(step, layer, Layer.V)
    weigh(scratch, dim * ROW, dim, w_q, heads * width, qkv, size, n, False)
    weigh(scratch, dim * ROW, dim, w_k, kv_heads * width, k, size, n, False)
    weigh(scratch, dim * ROW, dim, w_v, kv_heads * width, v, size, n, False)
    for b in range(n):
        if field(step, Step.QK_NORM) != 0:
            _norm_heads(step, layer, first + b, qkv + b * size, eps)
        position = (first + b) % field(step, Step.SEQUENCE_BLOCKS) * (width // 2) * ROW
        cos, sin = field(step, Step.COS) + position, field(step, Step.SIN) + position
        for h in range(heads + kv_heads):
            head = qkv + b * size + h * width * ROW
            rows.rotate(head, width, field(step, Step.INTERLEAVED), cos, sin, False)


@compiled
def _norm_heads(step, layer, block, qkv, eps):
    """Norm of each head of queries and keys; what they were before is kept."""
    width, heads = field(step, Step.HEAD_DIM), field(step, Step.HEADS)
    both = heads + field(step, Step.KV_HEADS)
    raw = block_of(layer_field(step, layer, Layer.RAW), both * width, block)
    rows.copy(qkv, raw, both * width * ROW)
    rstd = layer_field(step, layer, Layer.RAW_RSTD)
    row = field(step, Step.BLOCKS) * ROW
    for h in range(both):
        which = Layer.Q_NORM if h < heads else Layer.K_NORM
        weight, at = layer_field(step, layer, which), h * width * ROW
        rows.norm(raw + at, width, weight, eps, rstd + h * row + block * ROW, qkv + at)


@compiled
def _behind_attention(step, layer, first, n, scratch):
    """Output projection and residual, norm, SwiGLU, residual."""
    dim, hidden = field(step, Step.DIM), field(step, Step.HIDDEN)
    size, wide = dim * ROW, hidden * ROW
    x = block_of(layer_field(step, layer, Layer.X), dim, first)
    middle = block_of(layer_field(step, layer, Layer.X_MID), dim, first)
    q = q_dim(step)
    attn = block_of(layer_field(step, layer, Layer.ATTN), q, first)
    rows.copy(x, middle, n * size)
    weigh(attn, q * ROW, q, layer_field(step, layer, Layer.O_PROJ), dim, middle, size, n, True)
    eps = get_f32(step + 8 * Step.EPS)
    weight = layer_field(step, layer, Layer.POST_NORM)
    rstd = layer_field(step, layer, Layer.RSTD_MID) + first * ROW
    for b in range(n):
        rows.norm(middle + b * size, dim, weight, eps, rstd + b * ROW, scratch + b * size)
    gate = block_of(layer_field(step, layer, Layer.GATED), hidden, first)
    up = block_of(layer_field(step, layer, Layer.UPPED), hidden, first)
    weigh(scratch, size, dim, layer_field(step, layer, Layer.GATE), hidden, gate, wide, n, False)
    weigh(scratch, size, dim, layer_field(step, layer, Layer.UP), hidden, up, wide, n, False)
    rows.swiglu(gate, up, scratch, n * wide)
    out = block_of(input_of(step, layer + 1), dim, first)
    rows.copy(middle, out, n * size)
    down = layer_field(step, layer, Layer.DOWN)
    weigh(scratch, wide, hidden, down, dim, out, size, n, True)


@compiled
def _scale(step):
    return ONE / square_root(np.float32(field(step, Step.HEAD_DIM)))


@compiled
def forward_attention(step, layer, item, scratch):
    """A query head of a sequence."""
    heads, kv_heads = field(step, Step.HEADS), field(step, Step.KV_HEADS)
    width, blocks = field(step, Step.HEAD_DIM), field(step, Step.SEQUENCE_BLOCKS)
    sequence, head = item // heads, item % heads
    features = (heads + 2 * kv_heads) * width
    qkv = block_of(layer_field(step, layer, Layer.QKV), features, sequence * blocks)
    shared = head // (heads // kv_heads)
    tokens = head * field(step, Step.BLOCKS) * ROW + sequence * blocks * ROW
    out = block_of(layer_field(step, layer, Layer.ATTN), heads * width, sequence * blocks)
    attend(
        qkv + head * width * ROW,
        qkv + (heads + shared) * width * ROW,
        qkv + (heads + kv_heads + shared) * width * ROW,
        features * ROW, width, blocks, _scale(step),
        layer_field(step, layer, Layer.LARGEST) + tokens,
        layer_field(step, layer, Layer.INVERSE_SUM) + tokens,
        out + head * width * ROW, heads * width * ROW, scratch,
    )  # fmt: skip


@compiled
def backward_attention(step, layer, item, scratch):
    """A key head of a sequence, and the query heads that share it."""
    heads, kv_heads = field(step, Step.HEADS), field(step, Step.KV_HEADS)
    width, blocks = field(step, Step.HEAD_DIM), field(step, Step.SEQUENCE_BLOCKS)
    sequence, shared = item // kv_heads, item % kv_heads
    features = (heads + 2 * kv_heads) * width
    qkv = block_of(layer_field(step, layer, Layer.QKV), features, sequence * blocks)
    d_qkv = block_of(layer_field(step, layer, Layer.D_QKV), features, sequence * blocks)
    d_attn = block_of(field(step, Step.D_ATTN), heads * width, sequence * blocks)
    at_k, at_v = (heads + shared) * width * ROW, (heads + kv_heads + shared) * width * ROW
    group = heads // kv_heads
    for i in range(group):
        head = shared * group + i
        at = head * width * ROW
        tokens = head * field(step, Step.BLOCKS) * ROW + sequence * blocks * ROW
        attend_backward(
            qkv + at, qkv + at_k, qkv + at_v, features * ROW, width, blocks, _scale(step),
            layer_field(step, layer, Layer.LARGEST) + tokens,
            layer_field(step, layer, Layer.INVERSE_SUM) + tokens,
            field(step, Step.DELTA) + tokens,
            d_attn + at, heads * width * ROW, d_qkv + at, d_qkv + at_k, d_qkv + at_v,
            i > 0, scratch,
        )  # fmt: skip


@compiled
def loss(step, operation, item, scratch):
    """Final norm, head, loss, and their backward, of some blocks."""
    panel = panel_of(step, scratch)
    dim, vocab = field(step, Step.DIM), field(step, Step.VOCAB)
    size = dim * ROW
    start = field(operation, Operation.FIRST_BLOCK)
    per_item = field(step, Step.ITEM_BLOCKS)
    n = min(per_item, field(operation, Operation.N_BLOCKS) - item * per_item)
    first = start + item * per_item
    x = block_of(field(step, Step.X_LAST), dim, first)
    normed = block_of(field(step, Step.NORMED_LAST), dim, first)
    rstd = field(step, Step.RSTD_LAST) + first * ROW
    weight = field(step, Step.FINAL_NORM)
    eps = get_f32(step + 8 * Step.EPS)
    for b in range(n):
        rows.norm(x + b * size, dim, weight, eps, rstd + b * ROW, normed + b * size)
    logits = block_of(field(step, Step.LOGITS), vocab, item * per_item)
    largest, total = field(step, Step.LARGEST) + first * ROW, field(step, Step.SUM) + first * ROW
    for i in range(0, n * ROW, WIDTH):
        store(largest + i, splat(-math.inf))
        store(total + i, splat(0.0))
    head = field(step, Step.HEAD)
    wide = vocab * ROW
    for v in range(0, vocab, VOCAB_ROWS):
        count = min(VOCAB_ROWS, vocab - v)
        part = logits + v * ROW
        weigh(normed, size, dim, head + 4 * dim * v, count, part, wide, n, False)
        for b in range(n):
            for half in range(0, ROW, WIDTH):
                place = b * ROW + half
                _take_in(part + b * wide + half, count, largest + place, total + place)
    at_target = field(step, Step.AT_TARGET) + first * ROW
    targets = field(step, Step.TARGETS) + 8 * BLOCK * first
    for b in range(n):
        for t in range(BLOCK):
            target = max(0, get_i64(targets + 8 * (b * BLOCK + t)))
            value = get_f32(logits + b * wide + target * ROW + 4 * t)
            put_f32(at_target + b * ROW + 4 * t, value)
    if field(step, Step.WITHOUT_GRADIENTS) != 0:
        return
    weights = field(step, Step.LOSS_WEIGHTS) + first * ROW
    for v in range(0, vocab, VOCAB_ROWS):
        count = min(VOCAB_ROWS, vocab - v)
        part = logits + v * ROW
        for b in range(n):
            for half in range(0, ROW, WIDTH):
                place = b * ROW + half
                _gradients(
                    part + b * wide + half, count, largest + place, total + place, weights + place
                )
            for t in range(BLOCK):
                target = get_i64(targets + 8 * (b * BLOCK + t)) - v
                if 0 <= target < count:
                    at = part + b * wide + target * ROW + 4 * t
                    put_f32(at, get_f32(at) - get_f32(weights + b * ROW + 4 * t))
        weigh_back(
            part,
            wide,
            count,
            head + 4 * dim * v,
            dim,
            scratch,
            size,
            n,
            v > 0,
            panel,
        )
    d_x = block_of(field(step, Step.DX), dim, first)
    row = rows.padded_row(dim)
    for b in range(n):
        partial = field(step, Step.PARTIAL_LAST) + (first + b) * row
        rows.zero(partial, row)
        rows.norm_backward(
            x + b * size, dim, weight, rstd + b * ROW, scratch + b * size, d_x + b * size,
            partial, False,
        )  # fmt: skip


@compiled
def _take_in(logits, count, largest, total):
    """The largest logit and the sum of exponentials relative to it, with `count` more. A logit that
    is not finite makes the sum so."""
    old = load(largest)
    top, wrong = old, splat(0.0)
    for i in range(count):
        value = load(logits + i * ROW)
        top = maximum(top, value)
        wrong = fma(value, splat(0.0), wrong)
    part = wrong
    for i in range(count):
        part = add(part, exp(subtract(load(logits + i * ROW), top)))
    store(largest, top)
    store(total, fma(load(total), exp(subtract(old, top)), part))


@compiled
def _gradients(logits, count, largest, total, weight):
    """Logits become probabilities times each token's weight."""
    top = load(largest)
    scale = divide(load(weight), load(total))
    for i in range(count):
        at = logits + i * ROW
        store(at, multiply(exp(subtract(load(at), top)), scale))


@compiled
def backward_rows(step, layer, item, scratch):
    """From the attention of layer + 1 to that of `layer`; to the embedding where it is -1."""
    first = item * field(step, Step.ITEM_BLOCKS)
    n = _item_blocks(step, item)
    if layer + 1 < field(step, Step.N_LAYERS):
        _back_before_attention(step, layer + 1, first, n, scratch)
    if layer >= 0:
        _back_behind_attention(step, layer, first, n, scratch)


@compiled
def _back_behind_attention(step, layer, first, n, scratch):
    panel = panel_of(step, scratch)
    dim, hidden = field(step, Step.DIM), field(step, Step.HIDDEN)
    size, wide = dim * ROW, hidden * ROW
    d_x = block_of(field(step, Step.DX), dim, first)
    down = layer_field(step, layer, Layer.DOWN)
    weigh_back(d_x, size, dim, down, hidden, scratch, wide, n, False, panel)
    gate = block_of(layer_field(step, layer, Layer.GATED), hidden, first)
    up = block_of(layer_field(step, layer, Layer.UPPED), hidden, first)
    activation = block_of(field(step, Step.ACTIVATION), hidden, first)
    rows.swiglu_backward(gate, up, scratch, activation, n * wide)
    w_gate, w_up = layer_field(step, layer, Layer.GATE), layer_field(step, layer, Layer.UP)
    weigh_back(gate, wide, hidden, w_gate, dim, scratch, size, n, False, panel)
    weigh_back(up, wide, hidden, w_up, dim, scratch, size, n, True, panel)
    middle = block_of(layer_field(step, layer, Layer.X_MID), dim, first)
    rstd = layer_field(step, layer, Layer.RSTD_MID) + first * ROW
    weight = layer_field(step, layer, Layer.POST_NORM)
    d_middle = block_of(field(step, Step.DX_MID), dim, first)
    rows.copy(d_x, d_middle, n * size)
    row = rows.padded_row(dim)
    for b in range(n):
        partial = layer_field(step, layer, Layer.PARTIAL_POST) + (first + b) * row
        rows.zero(partial, row)
        at = b * size
        rows.norm_backward(
            middle + at, dim, weight, rstd + b * ROW, scratch + at, d_middle + at, partial, True
        )
    heads, width = field(step, Step.HEADS), field(step, Step.HEAD_DIM)
    q = heads * width
    d_attn = block_of(field(step, Step.D_ATTN), q, first)
    w_o = layer_field(step, layer, Layer.O_PROJ)
    weigh_back(d_middle, size, dim, w_o, q, d_attn, q * ROW, n, False, panel)
    attn = block_of(layer_field(step, layer, Layer.ATTN), q, first)
    for b in range(n):
        for h in range(heads):
            at = (b * heads + h) * width * ROW
            to = field(step, Step.DELTA) + (h * field(step, Step.BLOCKS) + first + b) * ROW
            dot(attn + at, d_attn + at, width, to)


@compiled
def _back_before_attention(step, layer, first, n, scratch):
    panel = panel_of(step, scratch)
    dim, width = field(step, Step.DIM), field(step, Step.HEAD_DIM)
    heads, kv_heads = field(step, Step.HEADS), field(step, Step.KV_HEADS)
    features = (heads + 2 * kv_heads) * width
    size, wide = dim * ROW, features * ROW
    d_qkv = block_of(layer_field(step, layer, Layer.D_QKV), features, first)
    for b in range(n):
        position = (first + b) % field(step, Step.SEQUENCE_BLOCKS) * (width // 2) * ROW
        cos, sin = field(step, Step.COS) + position, field(step, Step.SIN) + position
        for h in range(heads + kv_heads):
            head = d_qkv + b * wide + h * width * ROW
            rows.rotate(head, width, field(step, Step.INTERLEAVED), cos, sin, True)
        if field(step, Step.QK_NORM) != 0:
            _back_norm_heads(step, layer, first + b, d_qkv + b * wide)
    d_k, d_v = d_qkv + heads * width * ROW, d_qkv + (heads + kv_heads) * width * ROW
    w_q, w_k = layer_field(step, layer, Layer.Q), layer_field(step, layer, Layer.K)
    w_v = layer_field(step, layer, Layer.V)
    weigh_back(d_qkv, wide, heads * width, w_q, dim, scratch, size, n, False, panel)
    weigh_back(d_k, wide, kv_heads * width, w_k, dim, scratch, size, n, True, panel)
    weigh_back(d_v, wide, kv_heads * width, w_v, dim, scratch, size, n, True, panel)
    x = block_of(layer_field(step, layer, Layer.X), dim, first)
    rstd = layer_field(step, layer, Layer.RSTD) + first * ROW
    weight = layer_field(step, layer, Layer.INPUT_NORM)
    d_x = block_of(field(step, Step.DX), dim, first)
    rows.copy(block_of(field(step, Step.DX_MID), dim, first), d_x, n * size)
    row = rows.padded_row(dim)
    for b in range(n):
        partial = layer_field(step, layer, Layer.PARTIAL_INPUT) + (first + b) * row
        rows.zero(partial, row)
        at = b * size
        rows.norm_backward(
            x + at, dim, weight, rstd + b * ROW, scratch + at, d_x + at, partial, True
        )


@compiled
def _back_norm_heads(step, layer, block, d_qkv):
    width, heads = field(step, Step.HEAD_DIM), field(step, Step.HEADS)
    both = heads + field(step, Step.KV_HEADS)
    raw = block_of(layer_field(step, layer, Layer.RAW), both * width, block)
    rstd = layer_field(step, layer, Layer.RAW_RSTD)
    tokens = field(step, Step.BLOCKS) * ROW
    row = rows.padded_row(width)
    partial_q = layer_field(step, layer, Layer.PARTIAL_Q) + block * row
    partial_k = layer_field(step, layer, Layer.PARTIAL_K) + block * row
    rows.zero(partial_q, row)
    rows.zero(partial_k, row)
    for h in range(both):
        which = Layer.Q_NORM if h < heads else Layer.K_NORM
        partial = partial_q if h < heads else partial_k
        weight, at = layer_field(step, layer, which), h * width * ROW
        rows.norm_backward(
            raw + at, width, weight, rstd + h * tokens + block * ROW, d_qkv + at, d_qkv + at,
            partial, False,
        )  # fmt: skip
