"""The stages of a token in Triton, for few rows.

A product has no tensor cores here: with one row they would wait for it longer than they compute. A
warp has whole rows of the weight, so that its sums stay within it. Weights are loaded before the
launch ahead has ended; what that launch wrote is loaded after it, past the L1.

Shapes: B rows, S slots, D model width, H heads, K kv heads, E head width, F hidden width, V
vocabulary, C chunks of the context. A CTA has ROWS rows, one after another. WIDTH is a power of
two: the inner dimension or more, or how much of it is taken at once. The weights of norms are
multiplied into those of products (pack.py), and the elements of a rotary pair are neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from onelaunch.engines.cuda.sync import DEPENDENT

# mypy cannot type tuples that grow in an unrolled loop of a kernel.
# mypy: disable-error-code="assignment"

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def wait(MODE: tl.constexpr):
    """Until the launch ahead has ended. Only then may the next one be scheduled: whatever runs is
    ordered behind all launches but the one ahead, and may read what they wrote before it waits."""
    if MODE == DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _weights(w_ptr, rows, n_rows: tl.constexpr, start, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a weight, (BN, WIDTH), from column `start` on; zeros beyond both ends."""
    inner = start + tl.arange(0, WIDTH)
    mask = (rows < n_rows)[:, None] & (inner < INNER)[None, :]
    at = w_ptr + rows.to(tl.int64)[:, None] * INNER + inner[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _inputs(x_ptr, rows, start, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """A row of x in the layout of `_weights`: each thread loads what it multiplies."""
    inner = start + tl.arange(0, WIDTH)
    at = x_ptr + (rows * 0)[:, None] + inner[None, :]
    mask = (rows >= 0)[:, None] & (inner < INNER)[None, :]
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _dot_and_squares(
    w, w_ptr, x_ptr, rows, n_rows: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr
):
    """(BN,) products of a row of x with rows of a weight, and the sum of the row's squares. `w` is
    the first WIDTH columns, loaded before."""
    x = _inputs(x_ptr, rows, 0, INNER, WIDTH)
    products, squares = w.to(tl.float32) * x, x * x
    for start in tl.range(WIDTH, INNER, WIDTH):
        more = _weights(w_ptr, rows, n_rows, start, INNER, WIDTH)
        x = _inputs(x_ptr, rows, start, INNER, WIDTH)
        products += more.to(tl.float32) * x
        squares += x * x
    return tl.sum(products, 1), tl.sum(squares, 1)


@triton.jit
def _dot(w, w_ptr, x_ptr, rows, n_rows: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """The products alone."""
    x = _inputs(x_ptr, rows, 0, INNER, WIDTH)
    products = w.to(tl.float32) * x
    for start in tl.range(WIDTH, INNER, WIDTH):
        more = _weights(w_ptr, rows, n_rows, start, INNER, WIDTH)
        products += more.to(tl.float32) * _inputs(x_ptr, rows, start, INNER, WIDTH)
    return tl.sum(products, 1)


@triton.jit(repr=lambda s: "decode_qkv")
def qkv_kernel(
    x_ptr, w_ptr, qkv_ptr, eps,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """qkv: (B, N), float32, of normalized rows of x, (B, D), before norms of heads and rotation."""
    tiles: tl.constexpr = (N + BN - 1) // BN
    rows = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    w = _weights(w_ptr, rows, N, 0, D, WIDTH)
    wait(MODE)
    for r in tl.static_range(ROWS):
        b = tl.program_id(0) // tiles * ROWS + r
        dot, squares = _dot_and_squares(w, w_ptr, x_ptr + b * D, rows, N, D, WIDTH)
        tl.store(qkv_ptr + b * N + rows, dot * tl.rsqrt(squares / D + eps), mask=rows < N)


@triton.jit(repr=lambda s: "decode_gate_up")
def gate_up_kernel(
    x_ptr, w_ptr, hidden_ptr, eps,
    D: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """hidden: (B, F) = silu(gate) up of normalized rows of x; rows of the weight alternate."""
    tiles: tl.constexpr = (F + BN - 1) // BN
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    w_gate = _weights(w_ptr, 2 * columns, 2 * F, 0, D, WIDTH)
    w_up = _weights(w_ptr, 2 * columns + 1, 2 * F, 0, D, WIDTH)
    wait(MODE)
    for r in tl.static_range(ROWS):
        b = tl.program_id(0) // tiles * ROWS + r
        gate, squares = _dot_and_squares(w_gate, w_ptr, x_ptr + b * D, 2 * columns, 2 * F, D, WIDTH)
        up = _dot(w_up, w_ptr, x_ptr + b * D, 2 * columns + 1, 2 * F, D, WIDTH)
        rstd = tl.rsqrt(squares / D + eps)
        gate *= rstd
        hidden = gate / (1 + tl.exp(-gate)) * (up * rstd)
        to = hidden_ptr + b * F + columns
        tl.store(to, hidden.to(hidden_ptr.dtype.element_ty), mask=columns < F)


@triton.jit(repr=lambda s: "decode_down")
def add_product_kernel(
    x_ptr, y_ptr, w_ptr,
    D: tl.constexpr, INNER: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """x: (B, D) += y w^T, y: (B, INNER)."""
    tiles: tl.constexpr = (D + BN - 1) // BN
    rows = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    w = _weights(w_ptr, rows, D, 0, INNER, WIDTH)
    wait(MODE)
    for r in tl.static_range(ROWS):
        b = tl.program_id(0) // tiles * ROWS + r
        x = tl.load(x_ptr + b * D + rows, mask=rows < D, other=0.0, cache_modifier=".cg")
        dot = _dot(w, w_ptr, y_ptr + b * INNER, rows, D, INNER, WIDTH)
        to = (x.to(tl.float32) + dot).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + b * D + rows, to, mask=rows < D)


@triton.jit
def _rotated(at, element, norm_ptr, cos, sin, eps, E: tl.constexpr, PADDED: tl.constexpr):
    """A head of queries or keys from `at`, (PADDED,), float32: its norm where it has one, and its
    rotation; without a table as it is. Element e of pair (a, b) is a cos - b sin or b cos + a sin:
    of the other one a second load is nearer than another thread."""
    inside = element < E
    own = tl.load(at + element, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    if cos is not None:
        pair = element ^ 1
        other = tl.load(at + pair, mask=inside, other=0.0, cache_modifier=".cg")
        if norm_ptr is not None:
            scale = tl.rsqrt(tl.sum(own * own, 0) / E + eps)
            own *= scale * tl.load(norm_ptr + element, mask=inside, other=0.0).to(tl.float32)
            other *= scale * tl.load(norm_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        sign = tl.where(element % 2 == 0, -1.0, 1.0)
        own = own * cos + sign * other * sin
    return own


@triton.jit(do_not_specialize=("context", "chunks"), repr=lambda s: "decode_attention")
def attention_kernel(
    qkv_ptr, norms_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr,
    acc_ptr, m_l_ptr, eps, scale, context, chunks,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Attention of each row's newest position over one chunk of its context, and its key and value
    into the cache. Without tables queries and keys are rotated, and normalized, already. keys,
    values: (S, K, context, E); slots: (B,); positions: (S,), int32. acc: (B,
    H, C, PADDED) and m_l: (B, H, C, 2), float32: a chunk's sums, its maximum and its normalizer, of
    scores times log2(e)."""
    chunk, pair = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    b, key = pair // K, pair % K
    N: tl.constexpr = (H + 2 * K) * E
    GROUP: tl.constexpr = H // K
    slot = tl.load(slots_ptr + b)
    position = tl.load(positions_ptr + slot)
    element = tl.arange(0, PADDED)
    inside = element < E
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    cached = (slot * K + key).to(tl.int64) * context * E
    in_cache = (at < position)[:, None] & inside[None, :]
    within = cached + at.to(tl.int64)[:, None] * E + element[None, :]
    # of tokens before: no launch that may still run wrote them
    k = tl.load(keys_ptr + within, mask=in_cache, other=0.0)
    v = tl.load(values_ptr + within, mask=in_cache, other=0.0)
    cos, sin = cos_ptr, sin_ptr
    if cos_ptr is not None:
        cos = tl.load(cos_ptr + position * (E // 2) + element // 2, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + position * (E // 2) + element // 2, mask=inside, other=0.0)
    wait(MODE)
    row_ptr = qkv_ptr + b * N
    q_norm, k_norm = norms_ptr, norms_ptr
    if norms_ptr is not None:
        k_norm = norms_ptr + E
    if (chunk <= position // CHUNK) | (chunk == 0):
        if chunk == position // CHUNK:
            new_k = _rotated(row_ptr + (H + key) * E, element, k_norm, cos, sin, eps, E, PADDED)
            new_k = new_k.to(keys_ptr.dtype.element_ty)
            new_v = tl.load(
                row_ptr + (H + K + key) * E + element, mask=inside, other=0.0, cache_modifier=".cg"
            ).to(values_ptr.dtype.element_ty)
            to = cached + position.to(tl.int64) * E + element
            tl.store(keys_ptr + to, new_k, mask=inside)
            tl.store(values_ptr + to, new_v, mask=inside)
            newest = (at == position)[:, None]
            k = tl.where(newest, new_k[None, :], k)
            v = tl.where(newest, new_v[None, :], v)
        keys, values = k.to(tl.float32), v.to(tl.float32)
        for g in tl.static_range(GROUP):
            head = key * GROUP + g
            q = _rotated(row_ptr + head * E, element, q_norm, cos, sin, eps, E, PADDED)
            # as the forward rounds it
            q = q.to(keys_ptr.dtype.element_ty).to(tl.float32) * (scale * _LOG2E)
            score = tl.where(at <= position, tl.sum(keys * q[None, :], 1), float("-inf"))
            m = tl.max(score, 0)
            p = tl.exp2(score - m)
            at_chunk = (b * H + head) * chunks + chunk
            acc = tl.sum(values * p[:, None], 0)
            tl.store(acc_ptr + at_chunk * PADDED + element, acc)
            tl.store(m_l_ptr + 2 * at_chunk, m)
            tl.store(m_l_ptr + 2 * at_chunk + 1, tl.sum(p, 0))


@triton.jit
def _merged(
    acc_ptr, m_l_ptr, rows, b, last_chunk, start, chunks,
    H: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What attention gives a row, in the layout of `_weights`: its chunks in their order."""
    inner = start + tl.arange(0, WIDTH)
    at = (rows * 0)[:, None] + inner[None, :]
    mask = (rows >= 0)[:, None] & (inner < H * E)[None, :]
    head, element = at // E, at % E
    first = (b * H + head) * chunks
    m = tl.load(m_l_ptr + 2 * first, mask=mask, other=0.0, cache_modifier=".cg")
    l = tl.load(m_l_ptr + 2 * first + 1, mask=mask, other=1.0, cache_modifier=".cg")  # noqa: E741
    acc = tl.load(acc_ptr + first * PADDED + element, mask=mask, other=0.0, cache_modifier=".cg")
    for c in tl.range(1, last_chunk + 1):
        more = 2 * (first + c)
        m_c = tl.load(m_l_ptr + more, mask=mask, other=0.0, cache_modifier=".cg")
        l_c = tl.load(m_l_ptr + more + 1, mask=mask, other=0.0, cache_modifier=".cg")
        acc_c = tl.load(
            acc_ptr + (first + c) * PADDED + element, mask=mask, other=0.0, cache_modifier=".cg"
        )
        m_new = tl.maximum(m, m_c)
        alpha, beta = tl.exp2(m - m_new), tl.exp2(m_c - m_new)
        l = l * alpha + l_c * beta  # noqa: E741
        acc = acc * alpha + acc_c * beta
        m = m_new
    return acc / l


@triton.jit(do_not_specialize=("chunks",), repr=lambda s: "decode_merge")
def merge_kernel(
    acc_ptr, m_l_ptr, attn_out_ptr, slots_ptr, positions_ptr, chunks,
    H: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """attn_out: (B, H E), of attention's chunks in their order; a CTA has a head of a row."""
    b, head = tl.program_id(0) // H, tl.program_id(0) % H
    last_chunk = tl.load(positions_ptr + tl.load(slots_ptr + b)) // CHUNK
    element = tl.arange(0, PADDED)
    first = tl.program_id(0) * chunks
    wait(MODE)
    m = tl.load(m_l_ptr + 2 * first, cache_modifier=".cg")
    l = tl.load(m_l_ptr + 2 * first + 1, cache_modifier=".cg")  # noqa: E741
    acc = tl.load(acc_ptr + first * PADDED + element, cache_modifier=".cg")
    for c in tl.range(1, last_chunk + 1):
        m_c = tl.load(m_l_ptr + 2 * (first + c), cache_modifier=".cg")
        l_c = tl.load(m_l_ptr + 2 * (first + c) + 1, cache_modifier=".cg")
        acc_c = tl.load(acc_ptr + (first + c) * PADDED + element, cache_modifier=".cg")
        m_new = tl.maximum(m, m_c)
        alpha, beta = tl.exp2(m - m_new), tl.exp2(m_c - m_new)
        l = l * alpha + l_c * beta  # noqa: E741
        acc = acc * alpha + acc_c * beta
        m = m_new
    to = attn_out_ptr + b * (H * E) + head * E + element
    tl.store(to, (acc / l).to(attn_out_ptr.dtype.element_ty), mask=element < E)


@triton.jit(do_not_specialize=("chunks",), repr=lambda s: "decode_out_proj")
def out_proj_kernel(
    x_ptr, acc_ptr, m_l_ptr, w_ptr, slots_ptr, positions_ptr, chunks,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    BN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """x: (B, D) += attention w^T, of attention's chunks."""
    INNER: tl.constexpr = H * E
    tiles: tl.constexpr = (D + BN - 1) // BN
    rows = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    w = _weights(w_ptr, rows, D, 0, INNER, WIDTH)
    wait(MODE)
    for r in tl.static_range(ROWS):
        b = tl.program_id(0) // tiles * ROWS + r
        last_chunk = tl.load(positions_ptr + tl.load(slots_ptr + b)) // CHUNK
        x = tl.load(x_ptr + b * D + rows, mask=rows < D, other=0.0, cache_modifier=".cg")
        y = _merged(acc_ptr, m_l_ptr, rows, b, last_chunk, 0, chunks, H, E, PADDED, WIDTH)
        # as the forward rounds it
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        products = w.to(tl.float32) * y
        for start in tl.range(WIDTH, INNER, WIDTH):
            more = _weights(w_ptr, rows, D, start, INNER, WIDTH).to(tl.float32)
            y = _merged(acc_ptr, m_l_ptr, rows, b, last_chunk, start, chunks, H, E, PADDED, WIDTH)
            products += more * y.to(x_ptr.dtype.element_ty).to(tl.float32)
        to = (x.to(tl.float32) + tl.sum(products, 1)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + b * D + rows, to, mask=rows < D)


@triton.jit(repr=lambda s: "decode_head")
def head_kernel(
    x_ptr, w_ptr, logits_ptr, eps,
    D: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    CTAS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """logits: (B, V), float32, of normalized rows of x. CTAS share the tiles of a group of rows;
    each loads its next tile of the weight while it computes one."""
    tiles: tl.constexpr = (V + BN - 1) // BN
    first = tl.program_id(0) % CTAS
    group = tl.program_id(0) // CTAS * ROWS
    inner = tl.arange(0, WIDTH)
    w = _weights(w_ptr, first * BN + tl.arange(0, BN), V, 0, D, WIDTH)
    wait(MODE)
    xs, rstds = (), ()
    for r in tl.static_range(ROWS):
        squares = tl.zeros([WIDTH], tl.float32)
        for start in tl.static_range(0, D, WIDTH):
            at = x_ptr + (group + r) * D + start + inner
            x = tl.load(at, mask=start + inner < D, other=0.0, cache_modifier=".cg").to(tl.float32)
            squares += x * x
        xs += (x,)
        rstds += (tl.rsqrt(tl.sum(squares, 0) / D + eps),)
    for tile in tl.range(first, tiles, CTAS, num_stages=1):
        w_next = _weights(w_ptr, (tile + CTAS) * BN + tl.arange(0, BN), V, 0, D, WIDTH)
        rows = tile * BN + tl.arange(0, BN)
        for r in tl.static_range(ROWS):
            b = group + r
            if WIDTH >= D:
                dot = tl.sum(w.to(tl.float32) * xs[r][None, :], 1)
            else:
                dot = _dot(w, w_ptr, x_ptr + b * D, rows, V, D, WIDTH)
            tl.store(logits_ptr + b.to(tl.int64) * V + rows, dot * rstds[r], mask=rows < V)
        w = w_next
