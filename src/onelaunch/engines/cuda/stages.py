"""The stages as Triton kernels, one tile a program.

Shapes: N rows (positions through the batch), D model width, H heads, K kv heads, E head width, F
hidden width, V vocabulary. A program takes the tile of its number: row tile, then column tile. Sums
are float32; what is stored has the activations' dtype, logits float32. Products of float32 are
exact ones (`ieee`), not TF32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(n_rows, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of this program's tile of (n_rows, COLUMNS), the elements' offsets there,
    and which of the rows, columns and elements exist."""
    column_tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    tile = tl.program_id(0)
    rows = tile // column_tiles * BM + tl.arange(0, BM)
    columns = tile % column_tiles * BN + tl.arange(0, BN)
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    in_rows, in_columns = rows < n_rows, columns < COLUMNS
    return rows, columns, offsets, in_rows, in_columns, in_rows[:, None] & in_columns[None, :]


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    row_offsets,
    in_rows,
    columns,
    in_columns,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of x times rows of w, (BM, BN), and the sums of squares of x, (BM,)."""
    total = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in range(0, INNER, BK):
        inner = start + tl.arange(0, BK)
        in_inner = inner < INNER
        x = tl.load(
            x_ptr + row_offsets[:, None] + inner[None, :],
            mask=in_rows[:, None] & in_inner[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + columns[None, :].to(tl.int64) * INNER + inner[:, None],
            mask=in_columns[None, :] & in_inner[:, None],
            other=0.0,
        )
        total = tl.dot(x, w, total, input_precision="ieee")
        x32 = x.to(tl.float32)
        squares += tl.sum(x32 * x32, 1)
    return total, squares


@triton.jit
def embed_kernel(
    tokens_ptr,
    embedding_ptr,
    x_ptr,
    n_rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """x: (N, D) from the tokens' rows of the embedding."""
    rows, columns, offsets, in_rows, _, mask = _tile(n_rows, D, BM, BN)
    token = tl.load(tokens_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    found = tl.load(embedding_ptr + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
    tl.store(x_ptr + offsets, found, mask=mask)


@triton.jit
def qkv_kernel(
    x_ptr,
    w_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    n_rows,
    sequence,
    eps: tl.float32,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    QK_NORM: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    BK: tl.constexpr,
):
    """One head of queries, keys or values for BM rows: norm, product, head norm, rotation. qkv: (N,
    (H + 2 K) E); norms: (2, E), of queries and keys. HALF is the power of two from 16 on that holds
    E / 2."""
    half: tl.constexpr = E // 2
    tile = tl.program_id(0)
    head = tile % (H + 2 * K)
    rows = tile // (H + 2 * K) * BM + tl.arange(0, BM)
    in_rows = rows < n_rows
    element = tl.arange(0, HALF)
    in_half = element < half
    offsets = rows.to(tl.int64) * D
    first = head * E + element
    a, squares = _product(x_ptr, w_ptr, offsets, in_rows, first, in_half, D, BM, HALF, BK)
    b, _ = _product(x_ptr, w_ptr, offsets, in_rows, first + half, in_half, D, BM, HALF, BK)
    rstd = tl.rsqrt(squares / D + eps)[:, None]
    a *= rstd
    b *= rstd
    if head < H + K:
        if QK_NORM:
            norm_ptr = norms_ptr + tl.where(head < H, 0, E)
            scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / E + eps)[:, None]
            norm_a = tl.load(norm_ptr + element, mask=in_half, other=0.0).to(tl.float32)
            norm_b = tl.load(norm_ptr + half + element, mask=in_half, other=0.0).to(tl.float32)
            a *= scale * norm_a[None, :]
            b *= scale * norm_b[None, :]
        place = (rows % sequence)[:, None] * half + element[None, :]
        mask = in_rows[:, None] & in_half[None, :]
        cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    to = qkv_ptr + rows.to(tl.int64)[:, None] * ((H + 2 * K) * E) + first[None, :]
    mask = in_rows[:, None] & in_half[None, :]
    tl.store(to, a.to(qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(to + half, b.to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(
    qkv_ptr,
    mixed_ptr,
    sequence,
    scale: tl.float32,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One head for BM rows of one text: softmax(q k^T scale) v over what each row sees, with a
    running maximum (2205.14135). WIDTH is the power of two from 16 on that holds E."""
    tile = tl.program_id(0)
    head = tile % H
    tiles_of_text = tl.cdiv(sequence, BM)
    text = tile // H // tiles_of_text
    first = tile // H % tiles_of_text * BM
    key = H + head // (H // K)  # the key's head in qkv; its value's is K further
    row: tl.constexpr = (H + 2 * K) * E
    places = first + tl.arange(0, BM)
    element = tl.arange(0, WIDTH)
    in_head = element < E
    start_of_text = text.to(tl.int64) * sequence
    rows = (start_of_text + places)[:, None]
    within = head * E + element[None, :]
    q_mask = (places < sequence)[:, None] & in_head[None, :]
    q = tl.load(qkv_ptr + rows * row + within, mask=q_mask, other=0.0)
    most = tl.full([BM], float("-inf"), tl.float32)
    divisor = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, WIDTH], tl.float32)
    for start in range(0, tl.minimum(first + BM, sequence), BN):
        keys = start + tl.arange(0, BN)
        offsets = (start_of_text + keys) * row + key * E
        in_text = keys < sequence
        k = tl.load(
            qkv_ptr + offsets[None, :] + element[:, None],
            mask=in_text[None, :] & in_head[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = (keys[None, :] <= places[:, None]) & in_text[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shrunk = tl.exp(most - higher)
        weights = tl.exp(scores - higher[:, None])
        divisor = divisor * shrunk + tl.sum(weights, 1)
        v = tl.load(
            qkv_ptr + K * E + offsets[:, None] + element[None, :],
            mask=in_text[:, None] & in_head[None, :],
            other=0.0,
        )
        total *= shrunk[:, None]
        total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
        most = higher
    mixed = total / divisor[:, None]
    tl.store(mixed_ptr + rows * (H * E) + within, mixed.to(mixed_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def add_product_kernel(
    y_ptr,
    w_ptr,
    x_ptr,
    n_rows,
    INNER: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x += y w^T, x: (N, D), y: (N, INNER): out_proj and down with the residual."""
    rows, columns, offsets, in_rows, in_columns, mask = _tile(n_rows, D, BM, BN)
    total, _ = _product(
        y_ptr, w_ptr, rows.to(tl.int64) * INNER, in_rows, columns, in_columns, INNER, BM, BN, BK
    )
    before = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, (before + total).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_up_kernel(
    x_ptr,
    w_ptr,
    hidden_ptr,
    n_rows,
    eps: tl.float32,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden: (N, F) = silu(gate) up (2002.05202), of the normalized rows of x."""
    rows, columns, offsets, in_rows, in_columns, mask = _tile(n_rows, F, BM, BN)
    of_x = rows.to(tl.int64) * D
    gate, squares = _product(x_ptr, w_ptr, of_x, in_rows, columns, in_columns, D, BM, BN, BK)
    up, _ = _product(x_ptr, w_ptr, of_x, in_rows, columns + F, in_columns, D, BM, BN, BK)
    rstd = tl.rsqrt(squares / D + eps)[:, None]
    gate *= rstd
    up *= rstd
    hidden = gate / (1 + tl.exp(-gate)) * up
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_kernel(
    x_ptr,
    w_ptr,
    logits_ptr,
    n_rows,
    step,
    start,
    eps: tl.float32,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """logits: (n_rows, V) of the normalized rows start, start + step, ... of x."""
    rows, columns, offsets, in_rows, in_columns, mask = _tile(n_rows, V, BM, BN)
    of_x = (rows.to(tl.int64) * step + start) * D
    total, squares = _product(x_ptr, w_ptr, of_x, in_rows, columns, in_columns, D, BM, BN, BK)
    total *= tl.rsqrt(squares / D + eps)[:, None]
    tl.store(logits_ptr + offsets, total, mask=mask)
