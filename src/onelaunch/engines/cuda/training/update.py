"""Triton kernels of the embedding's gradient, the gradients' norm and AdamW.

Weights, gradients and moments are flat float32 tensors of M elements; offsets are 64-bit. No kernel
uses atomics and every sum has a fixed order: the same gradients give the same bits.
"""

# mypy cannot type tuples that grow in an unrolled loop of a kernel.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_tokens_kernel(
    tokens_ptr, sorted_ptr, order_ptr, rows, R: tl.constexpr, BLOCK: tl.constexpr
):
    """R tokens to their places in a stable sort: behind all that are smaller, or equal and before.
    Each is compared with every other, BLOCK at once."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.load(tokens_ptr + row, mask=row < rows, other=0).to(tl.int32)
    smaller = tl.zeros([R, BLOCK], tl.int32)
    for start in tl.range(0, rows, BLOCK, num_stages=1):
        at = start + tl.arange(0, BLOCK)
        others = tl.load(tokens_ptr + at, mask=at < rows, other=0x7FFFFFFF).to(tl.int32)[None, :]
        equal_before = (others == token[:, None]) & (at[None, :] < row[:, None])
        smaller += ((others < token[:, None]) | equal_before).to(tl.int32)
    place = tl.sum(smaller, 1)
    tl.store(sorted_ptr + place, token, mask=row < rows)
    tl.store(order_ptr + place, row, mask=row < rows)


@triton.jit
def embedding_gradient_kernel(
    sorted_ptr,
    order_ptr,
    dx_ptr,
    gradient_ptr,
    edges_ptr,
    rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of runs of equal tokens in CHUNK sorted positions, BLOCK columns of them.

    A run that lies in the chunk is added to its token's gradient. Of one that begins before the
    chunk the sum goes to its first edge, of one that ends after it to the second. GROUP rows,
    and the gradients that they may end in, are loaded before the first of them is waited for."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < D
    edge_ptr = edges_ptr + chunk.to(tl.int64) * (2 * D) + columns
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    token = tl.load(sorted_ptr + first).to(tl.int64)
    begun_before = before == token
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, CHUNK, GROUP, num_stages=1):
        tokens = (token,)
        terms = ()
        previous = ()
        for i in tl.static_range(GROUP):
            at = first + start + i
            row = tl.load(order_ptr + at, mask=at < rows, other=0).to(tl.int64)
            tokens += (tl.load(sorted_ptr + at + 1, mask=at + 1 < rows, other=-1).to(tl.int64),)
            mask = in_row & (at < rows)
            terms += (tl.load(dx_ptr + row * D + columns, mask=mask, other=0.0),)
        # each token's gradient is added to once, and not in another CTA
        for i in tl.static_range(GROUP):
            mask = in_row & (tokens[i] != tokens[i + 1])
            out_ptr = gradient_ptr + tokens[i] * D + columns
            previous += (tl.load(out_ptr, mask=mask, other=0.0),)
        for i in tl.static_range(GROUP):
            total += terms[i]
            token = tokens[i]
            following = tokens[i + 1]
            ends = (token != following) | (start + i == CHUNK - 1)
            if ends & (token >= 0):
                if begun_before:
                    tl.store(edge_ptr, total, mask=in_row)
                elif token == following:
                    tl.store(edge_ptr + D, total, mask=in_row)
                else:
                    out_ptr = gradient_ptr + token * D + columns
                    tl.store(out_ptr, previous[i] + total, mask=in_row)
            total = tl.where(ends, 0.0, total)
            begun_before = begun_before & (token == following)
            token = following


@triton.jit
def join_edges_kernel(
    sorted_ptr,
    gradient_ptr,
    edges_ptr,
    rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The run that begins in this chunk and ends in a later one, if there is one: the sum of its
    edges is added to its token's gradient. HEADS chunks are looked at and EDGES edges are loaded at
    once."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    following = first + CHUNK
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    inside = following < rows
    token = tl.load(sorted_ptr + following - 1, mask=inside, other=-1).to(tl.int64)
    head = tl.load(sorted_ptr + following, mask=inside, other=-2).to(tl.int64)
    if (token == head) & (token != before):
        # chunks whose first token is the run's: as the tokens are sorted, the next ones
        chunks = 0
        looking = True
        while looking:
            at = (chunk + 1 + chunks + tl.arange(0, HEADS)) * CHUNK
            heads = tl.load(sorted_ptr + at, mask=at < rows, other=-1).to(tl.int64)
            found = tl.sum((heads == token).to(tl.int32), 0)
            chunks += found
            looking = found == HEADS
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        in_row = columns < D
        edge_ptr = edges_ptr + chunk.to(tl.int64) * (2 * D) + columns
        sums = tl.zeros([EDGES, BLOCK], tl.float32)
        for start in tl.range(0, chunks, EDGES, num_stages=1):
            edge = start + tl.arange(0, EDGES)[:, None]
            offsets = (1 + edge).to(tl.int64) * (2 * D)
            mask = (edge < chunks) & in_row[None, :]
            sums += tl.load(edge_ptr[None, :] + offsets, mask=mask, other=0.0)
        total = tl.load(edge_ptr + D, mask=in_row, other=0.0) + tl.sum(sums, 0)
        out_ptr = gradient_ptr + token * D + columns
        previous = tl.load(out_ptr, mask=in_row, other=0.0)
        tl.store(out_ptr, previous + total, mask=in_row)


@triton.jit
def sum_of_squares_kernel(gradients_ptr, partial_ptr, M, BLOCK: tl.constexpr):
    """One of P partial sums of squares: every P-th block."""
    program = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(
        program, tl.cdiv(M, BLOCK).to(tl.int32), tl.num_programs(0), num_stages=1
    ):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradients_ptr + offsets, mask=offsets < M, other=0.0)
        sums += gradient * gradient
    tl.store(partial_ptr + program, tl.sum(sums, 0))


@triton.jit
def adamw_kernel(
    weights_ptr,
    gradients_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    half_ptr,
    partial_ptr,
    numbers_ptr,
    norm_ptr,
    M,
    P,
    n_decayed,
    BLOCK: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 1711.05101), in the order of
    torch.optim.AdamW's operations, of gradients that are clipped by their norm as in
    torch.nn.utils.clip_grad_norm_. A CTA takes every so many-th block; each sums up the norm."""
    program = tl.program_id(0)
    index = tl.arange(0, BLOCK_PARTIALS)
    squares = tl.load(partial_ptr + index, mask=index < P, other=0.0)
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    if program == 0:
        tl.store(norm_ptr, norm)
    decay = tl.load(numbers_ptr)
    step_size = tl.load(numbers_ptr + 1)
    lerp1 = tl.load(numbers_ptr + 2)
    beta2 = tl.load(numbers_ptr + 3)
    lerp2 = tl.load(numbers_ptr + 4)
    correction2_sqrt = tl.load(numbers_ptr + 5)
    eps = tl.load(numbers_ptr + 6)
    clip = tl.load(numbers_ptr + 7)
    factor = tl.div_rn(clip, norm + 1e-6)
    # so ordered, a NaN stays one
    factor = tl.where((factor > 1) | (clip == 0) | (clip == float("inf")), 1.0, factor)
    for block in tl.range(
        program, tl.cdiv(M, BLOCK).to(tl.int32), tl.num_programs(0), num_stages=1
    ):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < M
        gradient = tl.load(gradients_ptr + offsets, mask=mask, other=0.0) * factor
        exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
        weight = tl.load(weights_ptr + offsets, mask=mask, other=0.0)
        weight *= tl.where(offsets < n_decayed, decay, 1.0)
        difference = gradient - exp_avg
        near = exp_avg + lerp1 * difference
        far = gradient - difference * (1 - lerp1)  # as torch.lerp beyond the middle
        exp_avg = tl.where(lerp1 < 0.5, near, far)
        exp_avg_sq = exp_avg_sq * beta2 + lerp2 * gradient * gradient
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2_sqrt) + eps
        weight -= step_size * tl.div_rn(exp_avg, denominator)
        tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
        tl.store(weights_ptr + offsets, weight, mask=mask)
        if half_ptr is not None:
            tl.store(half_ptr + offsets, weight.to(half_ptr.dtype.element_ty), mask=mask)
