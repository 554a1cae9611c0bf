"""Triton kernels of the cross-entropy loss, with its gradient in the logits' place.

C rows of logits, V columns. The loss of a row is logsumexp(logits) - logits[target], and its
gradient (softmax(logits) - onehot(target)) * weight; both are 0 where the target is -1. All
arithmetic is in float32, and every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_loss(loss_ptr, row, in_rows, best, total, at_target, target):
    loss = tl.log(total) + (best - at_target)  # so ordered, large logits cost no digits
    tl.store(loss_ptr + row, tl.where(target != -1, loss, 0.0), mask=in_rows)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    weight_ptr,
    loss_ptr,
    stride,
    rows,
    V: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """R rows, read once: a CTA holds them in registers.

    The target's column is written a second time: to compare each column with it took registers
    that rows of 32,000 logits do not have."""
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = first + local < rows
    mask = in_rows & (columns < V)
    logits_ptr += first * stride
    offsets = local.to(tl.int64) * stride + columns
    target = tl.load(targets_ptr + first + local, mask=in_rows, other=-1).to(tl.int32)
    has_target = target != -1
    target_ptr = logits_ptr + (local.to(tl.int64) * stride + target)
    at_target = tl.load(target_ptr, mask=has_target, other=0.0).to(tl.float32)
    x = tl.load(logits_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where(in_rows, x, 0.0)
    best = tl.max(x, 1, keep_dims=True)
    e = tl.exp(x - best)
    total = tl.sum(e, 1, keep_dims=True)
    _store_loss(loss_ptr, first + local, in_rows, best, total, at_target, target)
    if WITH_GRADIENT:
        weight = tl.load(weight_ptr)
        scale = weight / total
        tl.debug_barrier()  # every warp has its target's logit
        # a row without a target may hold anything
        gradient = tl.where(has_target, e * scale, 0.0)
        tl.store(logits_ptr + offsets, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        gradient = tl.exp(at_target - best) * scale - weight
        tl.store(target_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=has_target)


@triton.jit
def cross_entropy_blocks_kernel(
    logits_ptr,
    targets_ptr,
    weight_ptr,
    loss_ptr,
    stride,
    V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """One row, read twice, LANES * WIDTH columns at a time.

    Each lane has its own running maximum and sum (Milakov and Gimelshein, 1805.02867) of WIDTH
    neighbouring columns at a time, which one thread holds: no reduction between threads until the
    row's end, and one exponential for WIDTH columns to rescale the sum."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    target = tl.load(targets_ptr + row).to(tl.int32)
    has_target = target != -1
    at_target = tl.load(logits_ptr + target, mask=has_target, other=0.0).to(tl.float32)
    # finite, so that lanes without a column are 0 and not NaN
    m_i = tl.full([LANES], -3.0e38, tl.float32)
    l_i = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, V, LANES * WIDTH, num_stages=1):
        at = start + columns
        x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(x, 1))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new[:, None]), 1)
        m_i = m_new
    best = tl.max(m_i, 0)
    total = tl.sum(l_i * tl.exp(m_i - best), 0)
    _store_loss(loss_ptr, row, True, best, total, at_target, target)
    if WITH_GRADIENT:
        weight = tl.load(weight_ptr)
        scale = weight / total
        tl.debug_barrier()  # every warp has its target's logit
        for start in tl.range(0, V, LANES * WIDTH, num_stages=1):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            gradient = tl.where(has_target, tl.exp(x - best) * scale, 0.0)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)
        tl.debug_barrier()
        gradient = tl.exp(at_target - best) * scale - weight
        tl.store(logits_ptr + target, gradient.to(logits_ptr.dtype.element_ty), mask=has_target)


@triton.jit
def count_targets_kernel(targets_ptr, scale_ptr, weight_ptr, count_ptr, rows, BLOCK: tl.constexpr):
    """The number of targets that are not -1, and scale over it; 0 where there is none."""
    counts = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, rows, BLOCK, num_stages=1):
        at = start + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + at, mask=at < rows, other=-1)
        counts += (target != -1).to(tl.int32)
    count = tl.sum(counts, 0).to(tl.float32)
    weight = tl.div_rn(tl.load(scale_ptr), tl.maximum(count, 1.0))
    tl.store(weight_ptr, tl.where(count > 0, weight, 0.0))
    tl.store(count_ptr, count)


@triton.jit
def sum_loss_kernel(loss_ptr, count_ptr, out_ptr, rows, BLOCK: tl.constexpr, MEAN: tl.constexpr):
    """The sum of losses, or that over the number of targets."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, rows, BLOCK, num_stages=1):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(loss_ptr + at, mask=at < rows, other=0.0)
    result = tl.sum(sums, 0)
    if MEAN:
        result = tl.div_rn(result, tl.load(count_ptr))
    tl.store(out_ptr, result)
