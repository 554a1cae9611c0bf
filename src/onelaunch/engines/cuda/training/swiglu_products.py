"""Triton matrix products with SwiGLU in their epilogues, for GPUs with TMA (sm_90).

N rows, D columns of the residual stream, F of the feed-forward's hidden layer. The products read
tensors in the compute dtype T, bfloat16 or float16, through TMA descriptors, which fill with zeros
what is out of bounds; their sums are float32. Products are rounded to T before the SwiGLU, as they
are where a library writes them to memory, and its formulas are those of rows.py. A CTA takes every
P-th tile, BLOCK_M rows by BLOCK_F columns of the hidden layer, those of a row first: they share x.

Epilogues go by PARTS of a tile's columns, so that two CTAs of eight warps fit a multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _column_parts(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A tuple of a tile's columns in 1, 2 or 4 parts."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        return _halves(x, ROWS, COLUMNS)
    else:
        left, right = _halves(x, ROWS, COLUMNS)
        first, second = _halves(left, ROWS, COLUMNS // 2)
        third, fourth = _halves(right, ROWS, COLUMNS // 2)
        return (first, second, third, fourth)


@triton.jit
def gate_up_swiglu_kernel(
    x_desc,
    weight_desc,
    gate_up,
    hidden,
    rows,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    TMA_STORES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """gate_up = x weight' and hidden = silu(gate) * up.

    One product has the gates of a tile in its left half and the ups in its right one: the weight's
    descriptor is (2, F, D) with blocks (2, BLOCK_F, BLOCK_K). With TMA_STORES gate_up is a
    descriptor, (N, 2, F), and hidden too; else they are pointers."""
    T: tl.constexpr = x_desc.dtype
    WIDTH: tl.constexpr = BLOCK_F // PARTS
    blocks = tl.cdiv(F, BLOCK_F)
    tiles = tl.cdiv(rows, BLOCK_M) * blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row = tile // blocks * BLOCK_M
        column = tile % blocks * BLOCK_F
        both = tl.zeros([BLOCK_M, 2 * BLOCK_F], tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            weight = weight_desc.load([0, column, k]).reshape(2 * BLOCK_F, BLOCK_K)
            both = tl.dot(x_desc.load([row, k]), weight.T, both)
        gate, up = _halves(both, BLOCK_M, 2 * BLOCK_F)
        gates = _column_parts(gate.to(T), BLOCK_M, BLOCK_F, PARTS)
        ups = _column_parts(up.to(T), BLOCK_M, BLOCK_F, PARTS)
        for i in tl.static_range(PARTS):
            first = column + i * WIDTH
            gate_T, up_T = gates[i], ups[i]
            gate = gate_T.to(tl.float32)
            hidden_T = (gate * tl.sigmoid(gate) * up_T.to(tl.float32)).to(T)
            if TMA_STORES:
                gate_up.store([row, 0, first], gate_T.reshape(BLOCK_M, 1, WIDTH))
                gate_up.store([row, 1, first], up_T.reshape(BLOCK_M, 1, WIDTH))
                hidden.store([row, first], hidden_T)
            else:
                local = tl.arange(0, BLOCK_M)[:, None]
                columns = first + tl.arange(0, WIDTH)[None, :]
                mask = (row + local < rows) & (columns < F)
                begin = tl.cast(row, tl.int64)
                gate_ptr = gate_up + begin * (2 * F) + (local * (2 * F) + columns)
                tl.store(gate_ptr, gate_T, mask=mask)
                tl.store(gate_ptr + F, up_T, mask=mask)
                tl.store(hidden + begin * F + (local * F + columns), hidden_T, mask=mask)


@triton.jit
def _load_gate_up(
    gate_up_ptr, row, first, rows,
    F: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gates and ups of WIDTH columns, as they are in memory."""
    local = tl.arange(0, BLOCK_M)[:, None]
    columns = first + tl.arange(0, WIDTH)[None, :]
    mask = (row + local < rows) & (columns < F)
    gate_ptr = gate_up_ptr + tl.cast(row, tl.int64) * (2 * F) + (local * (2 * F) + columns)
    gate = tl.load(gate_ptr, mask=mask, other=0.0)
    return gate, tl.load(gate_ptr + F, mask=mask, other=0.0)


@triton.jit
def down_back_swiglu_kernel(
    dx_desc,
    weight_desc,
    gate_up_ptr,
    dgate_up_ptr,
    hidden_ptr,
    rows,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """dhidden = dx weight, and from it dgate and dup, which may take the place of gates and ups,
    and `hidden` again unless it is None. The weight is (D, F), its blocks (BLOCK_K, BLOCK_F).

    AHEAD is where a part's gates and ups are loaded: 0 where they are needed, 1 while the part
    before is computed, 2 like 1 and those of the first part before the product."""
    T: tl.constexpr = dx_desc.dtype
    WIDTH: tl.constexpr = BLOCK_F // PARTS
    blocks = tl.cdiv(F, BLOCK_F)
    tiles = tl.cdiv(rows, BLOCK_M) * blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row = tile // blocks * BLOCK_M
        column = tile % blocks * BLOCK_F
        if AHEAD == 2:
            gate_T, up_T = _load_gate_up(gate_up_ptr, row, column, rows, F, BLOCK_M, WIDTH)
        acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            acc = tl.dot(dx_desc.load([row, k]), weight_desc.load([k, column]), acc)
        if AHEAD != 2:
            gate_T, up_T = _load_gate_up(gate_up_ptr, row, column, rows, F, BLOCK_M, WIDTH)
        dhiddens = _column_parts(acc.to(T), BLOCK_M, BLOCK_F, PARTS)
        for i in tl.static_range(PARTS):
            first = column + i * WIDTH
            if AHEAD == 0 and i > 0:
                gate_T, up_T = _load_gate_up(gate_up_ptr, row, first, rows, F, BLOCK_M, WIDTH)
            gate, up = gate_T.to(tl.float32), up_T.to(tl.float32)
            if AHEAD > 0 and i + 1 < PARTS:
                gate_T, up_T = _load_gate_up(
                    gate_up_ptr, row, first + WIDTH, rows, F, BLOCK_M, WIDTH
                )
            dhidden = dhiddens[i].to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
            local = tl.arange(0, BLOCK_M)[:, None]
            columns = first + tl.arange(0, WIDTH)[None, :]
            mask = (row + local < rows) & (columns < F)
            begin = tl.cast(row, tl.int64)
            dgate_ptr = dgate_up_ptr + begin * (2 * F) + (local * (2 * F) + columns)
            tl.store(dgate_ptr, dgate.to(T), mask=mask)
            tl.store(dgate_ptr + F, (dhidden * silu).to(T), mask=mask)
            if hidden_ptr is not None:
                hidden_out = hidden_ptr + begin * F + (local * F + columns)
                tl.store(hidden_out, (silu * up).to(T), mask=mask)
