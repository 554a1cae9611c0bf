"""Triton kernels of RMSNorm and SwiGLU in training. A CTA computes tiles of R rows.

N rows, D columns of the residual stream, F of the feed-forward's hidden layer. The residual stream,
its gradient and the norms' weights are float32; what matrix products read is in the compute dtype.
All arithmetic is in float32.

RMSNorm:    y = x * rstd * w,   rstd = 1 / sqrt(mean(x^2) + eps)
backward:   m = dy * w,   n = x * rstd
            dx = rstd * (m - n * mean(m * n)),   dw = sum over rows of dy * n
(Zhang and Sennrich, 1910.07467)
SwiGLU:     h = silu(gate) * up,   silu(g) = g * s,   s = sigmoid(g)
backward:   dgate = dh * up * s * (1 + g * (1 - s)),   dup = dh * silu(g)
(Shazeer, 2002.05202)
"""

from __future__ import annotations

import triton
import triton.language as tl

from onelaunch.engines.cuda.training.dropout import keep_elements


@triton.jit
def _store_norm(
    x, weight_ptr, normed_ptr, rstd_ptr, first, rows, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize a tile (R, BLOCK) of rows from `first` on; columns beyond D are zero."""
    local = tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = first + local < rows
    in_row = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
    normed = (x * rstd * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + first * D + (local * D + columns), normed, mask=in_rows & in_row)
    tl.store(rstd_ptr + first + local, rstd, mask=in_rows)


@triton.jit
def _dropout(
    x, generator_ptr, first, R: tl.constexpr, BLOCK: tl.constexpr, DROPPED: tl.constexpr
):  # fmt: skip
    """A tile (R, BLOCK) of rows from `first` on, of which elements are dropped."""
    keep = keep_elements(generator_ptr, first, R, BLOCK, DROPPED)
    scale: tl.constexpr = 1 / (1 - DROPPED / 2**32)
    return tl.where(keep, x * scale, 0.0)


@triton.jit
def embed_norm_kernel(
    tokens_ptr,
    embedding_ptr,
    weight_ptr,
    x_ptr,
    normed_ptr,
    rstd_ptr,
    rows,
    eps: tl.float32,
    generator_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """x = dropout(embedding[token]), and its norm."""
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = first + local < rows
    mask = in_rows & (columns < D)
    token = tl.load(tokens_ptr + first + local, mask=in_rows, other=0).to(tl.int64)
    x = tl.load(embedding_ptr + token * D + columns, mask=mask, other=0.0)
    if generator_ptr is not None:
        x = _dropout(x, generator_ptr, first, R, BLOCK, DROPPED)
    tl.store(x_ptr + first * D + (local * D + columns), x, mask=mask)
    _store_norm(x, weight_ptr, normed_ptr, rstd_ptr, first, rows, eps, D, R, BLOCK)


@triton.jit
def add_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    rstd_ptr,
    rows,
    eps: tl.float32,
    generator_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """sum = x + dropout(delta), and its norm."""
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (first + local < rows) & (columns < D)
    offsets = local * D + columns
    x = tl.load(x_ptr + first * D + offsets, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
    if generator_ptr is not None:
        delta = _dropout(delta, generator_ptr, first, R, BLOCK, DROPPED)
    x += delta
    tl.store(sum_ptr + first * D + offsets, x, mask=mask)
    _store_norm(x, weight_ptr, normed_ptr, rstd_ptr, first, rows, eps, D, R, BLOCK)


@triton.jit
def norm_backward_kernel(
    dnormed_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    out_ptr,
    half_ptr,
    partial_ptr,
    rows,
    generator_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """out = dx + the gradient of the norm, and half = dropout(out) in its own dtype; dx, out and
    half may be None. A CTA takes every P-th tile and writes one row of dw's (P, D) partial sums."""
    program = tl.program_id(0)
    local = tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = local * D + columns
    in_row = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
    dweight = tl.zeros([R, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, R), tl.num_programs(0), num_stages=1):
        first = tl.cast(tile, tl.int64) * R
        in_rows = first + local < rows
        mask = in_rows & in_row
        rstd = tl.load(rstd_ptr + first + local, mask=in_rows, other=0.0)
        x = tl.load(x_ptr + first * D + offsets, mask=mask, other=0.0)
        dy = tl.load(dnormed_ptr + first * D + offsets, mask=mask, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            dx = tl.load(dx_ptr + first * D + offsets, mask=mask, other=0.0)
        else:
            dx = tl.zeros([R, BLOCK], tl.float32)
        n = x * rstd
        m = dy * weight
        dweight += dy * n
        out = dx + rstd * (m - n * (tl.sum(m * n, 1, keep_dims=True) / D))
        if out_ptr is not None:
            tl.store(out_ptr + first * D + offsets, out, mask=mask)
        if half_ptr is not None:
            if generator_ptr is not None:
                out = _dropout(out, generator_ptr, first, R, BLOCK, DROPPED)
            half = out.to(half_ptr.dtype.element_ty)
            tl.store(half_ptr + first * D + offsets, half, mask=mask)
    column = tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * D + column, tl.sum(dweight, 0), mask=column < D)


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    gradients_ptr,
    offsets_ptr,
    P,
    D: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """BLOCK_COLUMNS columns of one gradient: sums its (P, D) partial sums in a fixed order."""
    gradient = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    partial_ptr += gradient * P * D
    total = tl.zeros([BLOCK_PARTIALS, BLOCK_COLUMNS], tl.float32)
    for start in tl.range(0, P, BLOCK_PARTIALS, num_stages=1):
        row = start + tl.arange(0, BLOCK_PARTIALS)[:, None]
        mask = (row < P) & (columns[None, :] < D)
        total += tl.load(partial_ptr + (row * D + columns[None, :]), mask=mask, other=0.0)
    out_ptr = gradients_ptr + tl.load(offsets_ptr + gradient) + columns
    result = tl.sum(total, 0)
    if ACCUMULATE:
        result += tl.load(out_ptr, mask=columns < D, other=0.0)
    tl.store(out_ptr, result, mask=columns < D)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,
    hidden_ptr,
    rows,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """hidden = silu(gate) * up of R rows and BLOCK columns."""
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (first + local < rows) & (columns < F)
    gate_ptr = gate_up_ptr + first * (2 * F) + (local * (2 * F) + columns)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=mask, other=0.0).to(tl.float32)
    hidden = (gate * tl.sigmoid(gate) * up).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + first * F + (local * F + columns), hidden, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dhidden_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    hidden_ptr,
    rows,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate and dup of R rows and BLOCK columns, and `hidden` again unless it is None."""
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (first + local < rows) & (columns < F)
    offsets = local * (2 * F) + columns
    gate_ptr = gate_up_ptr + first * (2 * F) + offsets
    dgate_ptr = dgate_up_ptr + first * (2 * F) + offsets
    narrow = local * F + columns
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=mask, other=0.0).to(tl.float32)
    dhidden = tl.load(dhidden_ptr + first * F + narrow, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_ptr, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + F, (dhidden * silu).to(dgate_up_ptr.dtype.element_ty), mask=mask)
    if hidden_ptr is not None:
        hidden = (silu * up).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + first * F + narrow, hidden, mask=mask)
