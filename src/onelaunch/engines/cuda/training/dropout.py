"""Dropout's masks in the kernels of a training step, made again in the backward and never stored.

An element is dropped if 32 random bits are below DROPPED, its probability times 2^32, and else
multiplied by 1 / (1 - probability). The bits depend on two int64 at `generator_ptr`, the key of a
micro-step and the number of a site, and on where the element is; not on blocks or CTAs.

They are those of Philox4x32 (Salmon et al., 2011) in 7 rounds, the fewest that pass BigCrush. A
call gives four words. They are for four elements that one thread has: neighbours in a row, as loads
lay them out, or weights of attention 8 queries or 8 keys apart, as matrix products do, transposed
or not. Each element is written as a call of its own, with the same counter as the other three, and
the compiler makes one of them: 14 instructions a weight in the forward of attention (sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _word(generator_ptr, c0, c1, c2, c3, is_odd, is_upper):
    """Of each element one of a call's four words. c3 is below 8."""
    key = tl.load(generator_ptr)
    site = tl.load(generator_ptr + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, 8 * site + c3, 7)
    return tl.where(is_upper, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))


@triton.jit
def keep_elements(
    generator_ptr, first, R: tl.constexpr, BLOCK: tl.constexpr, DROPPED: tl.constexpr
):  # fmt: skip
    """Which elements of a tile (R, BLOCK) of rows from `first` on are kept."""
    row = first.to(tl.int32) + tl.arange(0, R)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    word = _word(generator_ptr, column & ~3, row, 0, 0, column & 1 != 0, column & 2 != 0)
    return word >= DROPPED


@triton.jit
def keep_weights(
    generator_ptr, head, first_row, query, first_key, key, DROPPED: tl.constexpr
):  # fmt: skip
    """Which weights of attention are kept: of queries counted from `first_row` and keys counted
    from position `first_key`, two aranges of which one is a column. Both begin at positions that
    are multiples of 16.

    With the lowest bits of keys in c3 the compiler finds equal counters: in c0, as it writes sums
    in several ways, it found half of them (sm_90, Triton 3.6)."""
    c0 = first_key + (key & ~15)
    c1 = first_row.to(tl.int32) + (query & ~8)
    word = _word(generator_ptr, c0, c1, head, key & 7, key & 8 != 0, query & 8 != 0)
    return word >= DROPPED
