"""Triton kernels of RMSNorm. N rows, C columns, R rows per tile.

Forward, of one row:   y = x * rstd * scale,   rstd = 1 / sqrt(mean(x^2) + eps)
Backward:              m = dy * scale,   n = x * rstd
                       dx = rstd * (m - n * mean(m * n))
                       dscale = sum over rows of dy * n
(Zhang and Sennrich, 1910.07467). The scale is weight + offset, or 1. In the llama casting n and
dy * n are rounded in dscale, as autograd of Hugging Face's module rounds them.

The forward does not store rstd: the backward reads x anyway, and sums its squares together with
m * x in one reduction. That saves the writes, the reads and the tensor (docs/log.md has figures).

Rows may have any stride. LAYOUT 0 is contiguous; 1 has one stride between rows; 2 has two, row i at
(i // inner) * outer_stride + (i % inner) * inner_stride, as the heads of packed projections.
Offsets of rows are 64-bit. CASTING is the index of a casting in `reference.CASTINGS`: 0 llama,
1 gemma, 2 none.
"""

# mypy cannot type tuples that grow in an unrolled loop of a kernel.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _row_offsets(row, inner, outer_stride, inner_stride, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of the first elements of rows. `row` is int64, of any shape."""
    if LAYOUT == 0:
        offsets = row * C
    elif LAYOUT == 1:
        offsets = row * outer_stride
    else:
        # A 64-bit division is slow; nested rows are fewer than 2^31.
        row32 = row.to(tl.int32)
        outer = row32 // inner
        within = row32 - outer * inner
        offsets = outer.to(tl.int64) * outer_stride + within.to(tl.int64) * inner_stride
    return offsets


@triton.jit
def _scale(w, offset, x_dtype: tl.constexpr, CASTING: tl.constexpr):
    """weight + offset in float32, rounded according to the casting."""
    if CASTING == 2:
        w = w.to(x_dtype)
    scale = w.to(tl.float32) + offset
    if CASTING != 1:
        scale = scale.to(w.dtype).to(tl.float32)
    return scale


@triton.jit
def _dscale_terms(dy, n, x_dtype: tl.constexpr, w_dtype: tl.constexpr, CASTING: tl.constexpr):
    """The terms that a row adds to dscale, in float32. Llama's module multiplies the weight by n in
    x's dtype; its autograd rounds dy * n to the promoted dtype of x and weight before the sum."""
    if CASTING == 0:
        n = n.to(x_dtype).to(tl.float32)
    terms = dy * n
    if CASTING == 0 and x_dtype == w_dtype:
        terms = terms.to(x_dtype).to(tl.float32)
    return terms


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    rows: tl.int64,
    inner: tl.int32,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    eps: tl.float32,
    offset: tl.float32,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CASTING: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Forward by rows or blocks: a CTA computes a tile of R rows of SEGMENTS times BLOCK columns.

    The weight is loaded before the reduction or after it."""
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < C
    first = tl.program_id(0).to(tl.int64) * R
    local = tl.arange(0, R)[:, None]
    mask = in_row
    if R > 1:
        mask = in_row & (first + local < rows)
    if LAYOUT == 0:
        # One 64-bit address per CTA, 32-bit offsets within its tile.
        x_ptr += first * C
        y_ptr += first * C
        x_offsets = local * C + columns
        y_offsets = x_offsets
    else:
        row = first + local
        x_offsets = _row_offsets(row, inner, x_outer, x_inner, C, LAYOUT) + columns
        y_offsets = _row_offsets(row, inner, y_outer, y_inner, C, LAYOUT) + columns
    w_columns = columns
    if BLOCK <= 256 and WEIGHT_FIRST:
        # Rows share a warp. A weight of one row would have another register layout than x, and
        # Triton would convert it through shared memory, with barriers.
        w_columns = columns + 0 * local
    xs = ()
    ws = ()
    for segment in tl.static_range(SEGMENTS):
        xs += (tl.load(x_ptr + (x_offsets + segment * BLOCK), mask=mask, other=0.0),)
    if HAS_WEIGHT and WEIGHT_FIRST:
        for segment in tl.static_range(SEGMENTS):
            ws += (tl.load(w_ptr + (w_columns + segment * BLOCK), mask=in_row, other=0.0),)
    squares = xs[0].to(tl.float32) * xs[0].to(tl.float32)
    for segment in tl.static_range(1, SEGMENTS):
        squares += xs[segment].to(tl.float32) * xs[segment].to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / C + eps)
    for segment in tl.static_range(SEGMENTS):
        x = xs[segment]
        y = x.to(tl.float32) * rstd
        if CASTING != 1:
            y = y.to(x.dtype).to(tl.float32)
        if HAS_WEIGHT:
            if WEIGHT_FIRST:
                w = ws[segment]
            else:
                w = tl.load(w_ptr + (w_columns + segment * BLOCK), mask=in_row, other=0.0)
            y *= _scale(w, offset, x.dtype, CASTING)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (y_offsets + segment * BLOCK), y, mask=mask)


@triton.jit
def forward_chunked_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    rows: tl.int64,
    inner: tl.int32,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    eps: tl.float32,
    offset: tl.float32,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CASTING: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Forward of wide rows: a CTA reads one row twice, BLOCK columns at a time.

    The second read comes from a cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += _row_offsets(row, inner, x_outer, x_inner, C, LAYOUT)
    y_ptr += _row_offsets(row, inner, y_outer, y_inner, C, LAYOUT)
    ZERO: tl.constexpr = None if C % BLOCK == 0 else 0.0
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_row = None if C % BLOCK == 0 else columns < C
        x = tl.load(x_ptr + columns, mask=in_row, other=ZERO, eviction_policy="evict_last")
        squares += x.to(tl.float32) * x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares, 0) / C + eps)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_row = None if C % BLOCK == 0 else columns < C
        x = tl.load(x_ptr + columns, mask=in_row, other=ZERO, eviction_policy="evict_first")
        y = x.to(tl.float32) * rstd
        if CASTING != 1:
            y = y.to(x.dtype).to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(w_ptr + columns, mask=in_row, other=ZERO, eviction_policy="evict_last")
            y *= _scale(w, offset, x.dtype, CASTING)
        tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    w_ptr,
    partials_ptr,
    rows: tl.int64,
    inner: tl.int32,
    dy_outer,
    dy_inner,
    x_outer,
    x_inner,
    dx_outer,
    dx_inner,
    eps: tl.float32,
    offset: tl.float32,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    CASTING: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Backward: a CTA computes dX of every grid-th tile of R rows, and one row of dW partials,
    accumulated as R x BLOCK float32 numbers in registers and summed at the end. dX may overwrite
    dY."""
    program = tl.program_id(0)
    if DEPENDENT_LAUNCH:
        # The kernel that sums the partials may start now; it waits for the end of this one.
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < C
    if HAS_WEIGHT:
        # Loaded as one row: in the shape of the tile, as forward, it is slower (docs/log.md).
        w = tl.load(w_ptr + columns, mask=in_row, other=0.0)
        scale = _scale(w, offset, x_ptr.dtype.element_ty, CASTING)
    if WEIGHT_GRADIENT:
        dscale = tl.zeros([R, BLOCK], tl.float32)
    tiles = tl.cdiv(rows, R).to(tl.int32)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[:, None]
        in_rows = row < rows
        mask = in_row & in_rows
        x_offsets = _row_offsets(row, inner, x_outer, x_inner, C, LAYOUT)
        dy_offsets = _row_offsets(row, inner, dy_outer, dy_inner, C, LAYOUT)
        # This is the last read of both.
        x = tl.load(
            x_ptr + x_offsets + columns, mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        dy = tl.load(
            dy_ptr + dy_offsets + columns, mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        m = dy
        if HAS_WEIGHT:
            m = dy * scale
        squares, dot = tl.reduce((x * x, x * m), 1, _add_pairs, keep_dims=True)
        # With eps = 0 the rows past the end would give 0 * inf.
        rstd = tl.where(in_rows, tl.rsqrt(squares / C + eps), 0.0)
        n = x * rstd
        dx = rstd * (m - n * (rstd * dot / C))
        if WEIGHT_GRADIENT:
            dscale += _dscale_terms(dy, n, x_ptr.dtype.element_ty, w_ptr.dtype.element_ty, CASTING)
        dx_offsets = _row_offsets(row, inner, dx_outer, dx_inner, C, LAYOUT)
        tl.store(dx_ptr + dx_offsets + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRADIENT:
        column = tl.arange(0, BLOCK)
        total = tl.sum(dscale, 0).to(partials_ptr.dtype.element_ty)
        tl.store(partials_ptr + program * C + column, total, mask=column < C)


@triton.jit
def backward_chunked_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    w_ptr,
    partials_ptr,
    rows: tl.int64,
    inner: tl.int32,
    dy_outer,
    dy_inner,
    x_outer,
    x_inner,
    dx_outer,
    dx_inner,
    eps: tl.float32,
    offset: tl.float32,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    CASTING: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """Backward of wide rows: as `backward_kernel`, but each tile is read twice, BLOCK columns at a
    time, and each CTA accumulates its row of partials in memory."""
    program = tl.program_id(0)
    if DEPENDENT_LAUNCH:
        gdc_launch_dependents()
    tiles = tl.cdiv(rows, R).to(tl.int32)
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=1):
        row = tl.cast(tile, tl.int64) * R + tl.arange(0, R)[:, None]
        in_rows = row < rows
        x_offsets = _row_offsets(row, inner, x_outer, x_inner, C, LAYOUT)
        dy_offsets = _row_offsets(row, inner, dy_outer, dy_inner, C, LAYOUT)
        dx_offsets = _row_offsets(row, inner, dx_outer, dx_inner, C, LAYOUT)
        squares = tl.zeros([R, BLOCK], tl.float32)
        dots = tl.zeros([R, BLOCK], tl.float32)
        for start in tl.range(0, C, BLOCK, num_stages=1):
            columns = start + tl.arange(0, BLOCK)[None, :]
            in_row = columns < C
            mask = in_row & in_rows
            x = tl.load(x_ptr + x_offsets + columns, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(dy_ptr + dy_offsets + columns, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                w = tl.load(w_ptr + columns, mask=in_row, other=0.0)
                m *= _scale(w, offset, x_ptr.dtype.element_ty, CASTING)
            squares += x * x
            dots += x * m
        rstd = tl.where(in_rows, tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / C + eps), 0.0)
        mean = rstd * tl.sum(dots, 1, keep_dims=True) / C
        for start in tl.range(0, C, BLOCK, num_stages=1):
            columns = start + tl.arange(0, BLOCK)[None, :]
            in_row = columns < C
            mask = in_row & in_rows
            x = tl.load(x_ptr + x_offsets + columns, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + dy_offsets + columns, mask=mask, other=0.0).to(tl.float32)
            m = dy
            if HAS_WEIGHT:
                w = tl.load(w_ptr + columns, mask=in_row, other=0.0)
                m = dy * _scale(w, offset, x_ptr.dtype.element_ty, CASTING)
            n = x * rstd
            dx = rstd * (m - n * mean)
            tl.store(dx_ptr + dx_offsets + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if WEIGHT_GRADIENT:
                column = start + tl.arange(0, BLOCK)
                partial = partials_ptr + program.to(tl.int64) * C + column
                # The first tile starts the sum, so the partials need no clearing.
                previous = tl.load(partial, mask=(column < C) & (tile != program), other=0.0)
                terms = _dscale_terms(
                    dy, n, x_ptr.dtype.element_ty, w_ptr.dtype.element_ty, CASTING
                )
                total = previous.to(tl.float32) + tl.sum(terms, 0)
                tl.store(partial, total.to(partials_ptr.dtype.element_ty), mask=column < C)


@triton.jit
def reduce_kernel(
    partials_ptr,
    dw_ptr,
    partials: tl.int32,
    C: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
):
    """dW of BLOCK_COLUMNS columns: sums the (partials, C) float32 partials in a fixed order."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if DEPENDENT_LAUNCH:
        gdc_wait()
    total = tl.zeros([BLOCK_PARTIALS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, partials, BLOCK_PARTIALS):
        row = start + tl.arange(0, BLOCK_PARTIALS)[:, None]
        mask = (row < partials) & (columns[None, :] < C)
        offsets = row.to(tl.int64) * C + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    dw = tl.sum(total, 0).to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + columns, dw, mask=columns < C)
