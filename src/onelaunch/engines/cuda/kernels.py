"""The stages as kernels, one launch a stage and one tile a program.

A product's tile may be rehearsed (`passes` = 2 in place of 1): computed once, of whatever is there
and stored nowhere, while the launch before still runs, so that its instructions and weights are
near when its turn comes. That number is no constant, or the compiler would write the tile twice.
Numbers of rows are not specialized: every length is the same binary.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from onelaunch.engines.cuda.stages import (
    AFTER,
    DEPENDENT,
    REAL,
    add_product_tile,
    attention_tile,
    embed_tile,
    gate_up_tile,
    head_tile,
    normalize_tile,
    qkv_tile,
)


@triton.jit
def _let_next_begin(MODE: tl.constexpr):
    """The next launch may be scheduled; it waits for this one's end before it reads."""
    if MODE == DEPENDENT:
        gdc_launch_dependents()


# $1 address, $2 bytes, a multiple of 16
_INTO_L2 = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i;
  mov.u32 i, %tid.x;
  setp.eq.u32 p, i, 0;
  @p setp.gt.s32 p, $2, 0;
  @p cp.async.bulk.prefetch.L2.global [$1], $2;
  mov.u32 $0, 0;
}
""")


@triton.jit
def _fetch(next_ptr, next_bytes, FETCH: tl.constexpr):
    """Ask for this program's share of what the stage after the next one reads, its weights, into
    the second cache."""
    if FETCH:
        share = tl.cdiv(tl.cdiv(next_bytes, 16), tl.num_programs(0)) * 16
        first = tl.program_id(0) * share
        tl.inline_asm_elementwise(
            _INTO_L2,
            "=r,l,r",
            [
                next_ptr.to(tl.int64, bitcast=True) + first,
                tl.minimum(share, next_bytes - first),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# the ids are the caller's, aligned as they come
@triton.jit(do_not_specialize=("n_rows",), do_not_specialize_on_alignment=("tokens_ptr",))
def embed_kernel(
    tokens_ptr,
    embedding_ptr,
    x_ptr,
    parts_ptr,
    bad_id_ptr,
    n_rows,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    embed_tile(
        tl.program_id(0), REAL, tokens_ptr, embedding_ptr, x_ptr, parts_ptr, bad_id_ptr, n_rows, V,
        D, BM, BN, MODE,
    )  # fmt: skip
    # not before: the next kernel reads weights before it waits, and what ran before this launch
    # may have written them
    _let_next_begin(MODE)


@triton.jit(do_not_specialize=("n_rows", "sequence"))
def qkv_kernel(
    x_ptr,
    parts_ptr,
    w_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    passes,
    n_rows,
    sequence,
    eps: tl.float32,
    next_ptr,
    next_bytes,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    QK_NORM: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
    FETCH: tl.constexpr,
):
    _let_next_begin(MODE)
    _fetch(next_ptr, next_bytes, FETCH)
    for turn in tl.range(0, passes, num_stages=1):
        real = (turn + 1) // passes
        qkv_tile(
            tl.program_id(0),
            real,
            x_ptr,
            parts_ptr,
            w_ptr,
            norms_ptr,
            cos_ptr,
            sin_ptr,
            qkv_ptr,
            n_rows * real,
            sequence,
            eps,
            D,
            H,
            K,
            E,
            QK_NORM,
            PARTS,
            BM,
            BN,
            STEP,
            BK,
            TAIL,
            LOADS,
            TMA,
            MODE,
        )


@triton.jit(do_not_specialize=("sequence",))
def attention_kernel(
    qkv_ptr,
    mixed_ptr,
    partial_ptr,
    arrived_ptr,
    sequence,
    scale: tl.float32,
    next_ptr,
    next_bytes,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    LOADS: tl.constexpr,
    MODE: tl.constexpr,
    FETCH: tl.constexpr,
):
    _let_next_begin(MODE)
    _fetch(next_ptr, next_bytes, FETCH)
    attention_tile(
        tl.num_programs(0) - 1 - tl.program_id(0),  # those with most keys first
        REAL,
        qkv_ptr,
        mixed_ptr,
        partial_ptr,
        arrived_ptr,
        sequence,
        scale,
        H,
        K,
        E,
        BM,
        BN,
        WIDTH,
        CHUNK,
        LOADS,
        MODE,
    )


@triton.jit(do_not_specialize=("n_rows",))
def add_product_kernel(
    y_ptr,
    w_ptr,
    x_ptr,
    parts_ptr,
    passes,
    n_rows,
    next_ptr,
    next_bytes,
    INNER: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
    FETCH: tl.constexpr,
):
    _let_next_begin(MODE)
    _fetch(next_ptr, next_bytes, FETCH)
    for turn in tl.range(0, passes, num_stages=1):
        real = (turn + 1) // passes
        add_product_tile(
            tl.program_id(0),
            real,
            y_ptr,
            w_ptr,
            x_ptr,
            parts_ptr,
            n_rows * real,
            INNER,
            D,
            BM,
            BN,
            BK,
            TAIL,
            LOADS,
            TMA,
            MODE,
        )


@triton.jit(do_not_specialize=("n_rows",))
def gate_up_kernel(
    x_ptr,
    parts_ptr,
    w_ptr,
    hidden_ptr,
    passes,
    n_rows,
    eps: tl.float32,
    next_ptr,
    next_bytes,
    D: tl.constexpr,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
    FETCH: tl.constexpr,
):
    _let_next_begin(MODE)
    _fetch(next_ptr, next_bytes, FETCH)
    for turn in tl.range(0, passes, num_stages=1):
        real = (turn + 1) // passes
        gate_up_tile(
            tl.program_id(0),
            real,
            x_ptr,
            parts_ptr,
            w_ptr,
            hidden_ptr,
            n_rows * real,
            eps,
            D,
            F,
            PARTS,
            BM,
            BN,
            BK,
            TAIL,
            LOADS,
            TMA,
            MODE,
        )


@triton.jit(do_not_specialize=("n_rows", "x_rows"))
def head_kernel(
    x_ptr,
    parts_ptr,
    w_ptr,
    logits_ptr,
    of_ptr,
    n_rows,
    x_rows,
    eps: tl.float32,
    D: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    MODE: tl.constexpr,
):
    """One tile a program; PERSISTENT, each program goes through many of them in one pipeline."""
    _let_next_begin(MODE)
    if PERSISTENT:
        if MODE == DEPENDENT:
            gdc_wait()
        tiles = tl.cdiv(n_rows, BM) * ((V + BN - 1) // BN)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            head_tile(
                tile, REAL, x_ptr, parts_ptr, w_ptr, logits_ptr, of_ptr, None, n_rows, x_rows,
                eps, D, V, PARTS, BM, BN, BK, TAIL, LOADS, TMA, AFTER,
            )  # fmt: skip
    else:
        head_tile(
            tl.program_id(0), REAL, x_ptr, parts_ptr, w_ptr, logits_ptr, of_ptr, None, n_rows,
            x_rows, eps, D, V, PARTS, BM, BN, BK, TAIL, LOADS, TMA, MODE,
        )  # fmt: skip


@triton.jit(do_not_specialize=("n_rows", "x_rows"))
def normalize_kernel(
    x_ptr,
    parts_ptr,
    normalized_ptr,
    of_ptr,
    n_rows,
    x_rows,
    eps: tl.float32,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    """What head multiplies, for a library to do it."""
    _let_next_begin(MODE)
    normalize_tile(
        tl.program_id(0), REAL, x_ptr, parts_ptr, normalized_ptr, of_ptr, n_rows, x_rows, eps, D,
        PARTS, BM, BN, MODE,
    )  # fmt: skip


@cache
def settle_names() -> None:
    """Have Triton name the functions here, and those of the stages, in the order of this module.

    What Triton 3.6 finds a kernel by in its store depends on whether the functions that it calls
    had a name before: processes that compile in other orders would not find each other's kernels.
    """
    for function in tuple(globals().values()):
        getattr(function, "cache_key", None)
