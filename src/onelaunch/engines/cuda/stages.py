"""The stages in Triton, written once: a tile of each as a function. kernels.py has a launch for
each, fused.py one for all.

Shapes: N rows (positions through the batch), D model width, H heads, K kv heads, E head width, F
hidden width, V vocabulary. A tile is known by its number: row tile, then column tile. Sums are
float32; what is stored has the dtype of where it goes. Products of float32 are exact ones (`ieee`),
not TF32. A stage that writes rows of x leaves the sums of squares of what it wrote, one for each
row and column tile, (PARTS, N): that is all that a norm needs of them.

BM, BN, BK: the tile's rows, its columns, and how much of the inner dimension is taken at once.
LOADS blocks are on their way at once; LOADS = 0 means all of the tile's weights in two blocks, of
BK and TAIL, asked for before what the tile waits for is there. What other stages wrote is read past
the first cache (".cg"): in one launch, who wrote it may be another multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from onelaunch.engines.cuda.sync import wait_for

# How a tile knows that what it reads has been written: the launch before has ended; or it says so
# (programmatic dependent launch); or counters of this launch say so, looked at by Triton's atomic
# additions or by NVIDIA's own instructions.
AFTER, DEPENDENT = tl.constexpr(0), tl.constexpr(1)
COUNTED, COUNTED_PTX = tl.constexpr(2), tl.constexpr(3)
REAL = tl.constexpr(1)  # what a kernel of one stage hands to its tile as `wait`; 0 in a rehearsal


@triton.jit
def _ready(wait, MODE: tl.constexpr):
    """Go on when what the tile reads has been written."""
    if MODE == DEPENDENT:
        if wait == REAL:
            gdc_wait()
    elif MODE >= COUNTED:
        wait_for(wait, MODE == COUNTED_PTX)


@triton.jit
def _corner(tile, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and the first column of a tile of COLUMNS columns."""
    column_tiles: tl.constexpr = (COLUMNS + BN - 1) // BN
    return tile // column_tiles * BM, tile % column_tiles * BN


@triton.jit
def _place(row, column, n_rows, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a tile of (n_rows, COLUMNS), and which of them exist."""
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    return rows, columns, rows < n_rows, columns < COLUMNS


@triton.jit
def _weights(
    w_ptr,
    columns,
    in_columns,
    first,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block of w^T, (WIDTH, BN), from row `first` on. WHOLE says what exists of it: 0 some rows
    and some columns, 1 all of its rows, 2 all of its columns, 3 all."""
    inner = first + tl.arange(0, WIDTH)
    at = w_ptr + columns[None, :].to(tl.int64) * INNER + inner[:, None]
    if WHOLE == 3:
        return tl.load(at)
    elif WHOLE == 2:
        return tl.load(at, mask=(inner < INNER)[:, None], other=0.0)
    elif WHOLE == 1:
        return tl.load(at, mask=in_columns[None, :], other=0.0)
    else:
        return tl.load(at, mask=in_columns[None, :] & (inner < INNER)[:, None], other=0.0)


@triton.jit
def _inputs(
    x_ptr, rows, in_rows, first, INNER: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """A block of x, (BM, WIDTH), from column `first` on, all of which exists where WHOLE."""
    inner = first + tl.arange(0, WIDTH)
    mask = in_rows[:, None]
    if not WHOLE:
        mask &= (inner < INNER)[None, :]
    return tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * INNER + inner[None, :],
        mask=mask,
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def _early(
    w_ptr,
    columns,
    in_columns,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The weights of a tile that takes them at once; of another one nothing."""
    all_columns: tl.constexpr = 2 if COLUMNS % BN == 0 else 0
    head: tl.constexpr = all_columns + (1 if BK <= INNER else 0)
    rest: tl.constexpr = all_columns + (1 if BK + TAIL <= INNER else 0)
    if LOADS > 0:
        return 0, 0
    elif TAIL > 0:
        return (
            _weights(w_ptr, columns, in_columns, 0, INNER, BK, head),
            _weights(w_ptr, columns, in_columns, BK, INNER, TAIL, rest),
        )
    else:
        return _weights(w_ptr, columns, in_columns, 0, INNER, BK, head), 0


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    early,
    row,
    rows,
    in_rows,
    column,
    columns,
    in_columns,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows of x times rows of w, (BM, BN). With TMA x_ptr and w_ptr are tensor descriptors, outside
    of which all is zero."""
    if TMA:
        total = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, INNER, BK, num_stages=LOADS):
            x = x_ptr.load([row, first])
            w = w_ptr.load([column, first])
            total = tl.dot(x, w.T, total, input_precision="ieee")
    elif LOADS == 0:
        x = _inputs(x_ptr, rows, in_rows, 0, INNER, BK, BK <= INNER)
        if TAIL > 0:
            tail = _inputs(x_ptr, rows, in_rows, BK, INNER, TAIL, BK + TAIL <= INNER)
        total = tl.dot(x, early[0], input_precision="ieee")
        if TAIL > 0:
            total = tl.dot(tail, early[1], total, input_precision="ieee")
    else:
        whole: tl.constexpr = INNER % BK == 0
        all_columns: tl.constexpr = 2 if COLUMNS % BN == 0 else 0
        total = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, INNER, BK, num_stages=LOADS):
            x = _inputs(x_ptr, rows, in_rows, first, INNER, BK, whole)
            w = _weights(
                w_ptr, columns, in_columns, first, INNER, BK, all_columns + (1 if whole else 0)
            )
            total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def _rstd(parts_ptr, n_rows, rows, in_rows, eps, D: tl.constexpr, PARTS: tl.constexpr):
    """1 / rms of rows of x, (BM,), from the sums of their squares, added in their order: by
    `tl.sum` two kernels may add them in two."""
    squares = tl.zeros_like(rows).to(tl.float32)
    for part in tl.static_range(PARTS):
        at = parts_ptr + part * n_rows + rows
        squares += tl.load(at, mask=in_rows, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(squares / D + eps)


@triton.jit
def _store_rows(
    x_ptr,
    parts_ptr,
    values,
    tile,
    n_rows,
    rows,
    columns,
    in_rows,
    in_columns,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile of x, and its sums of squares: of the values as they are stored."""
    parts: tl.constexpr = (D + BN - 1) // BN
    mask = in_rows[:, None] & in_columns[None, :]
    stored = values.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], stored, mask=mask)
    again = tl.where(mask, stored.to(tl.float32), 0.0)
    at = parts_ptr + tile % parts * n_rows + rows
    tl.store(at, tl.sum(again * again, 1), mask=in_rows)


@triton.jit
def embed_tile(
    tile,
    wait,
    tokens_ptr,
    embedding_ptr,
    x_ptr,
    parts_ptr,
    n_rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    """x: (N, D) from the tokens' rows of the embedding."""
    row, column = _corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = _place(row, column, n_rows, D, BM, BN)
    _ready(wait, MODE)
    token = tl.load(tokens_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    mask = in_rows[:, None] & in_columns[None, :]
    found = tl.load(embedding_ptr + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
    _store_rows(x_ptr, parts_ptr, found, tile, n_rows, rows, columns, in_rows, in_columns, D, BN)


@triton.jit
def qkv_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    norms_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    n_rows,
    sequence,
    eps,
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
):
    """qkv: (N, (H + 2 K) E): norm, product, the heads' norm, rotation. A tile has STEP columns, BN
    at most; with QK_NORM they are one head. norms: (2, E), of queries and keys."""
    wide: tl.constexpr = (H + 2 * K) * E
    column_tiles: tl.constexpr = (wide + STEP - 1) // STEP
    row, start = tile // column_tiles * BM, tile % column_tiles * STEP
    rows = row + tl.arange(0, BM)
    within = tl.arange(0, BN)
    columns = start + within
    in_rows = rows < n_rows
    in_columns = (within < STEP) & (columns < wide)
    full: tl.constexpr = wide if STEP == BN else BN + 1  # a narrower step leaves columns out
    early = _early(w_ptr, columns, in_columns, D, full, BN, BK, TAIL, LOADS)
    # neighbours are a rotary pair; values turn by nothing
    pair = start // 2 + tl.arange(0, BN // 2)
    turns = in_rows[:, None] & (pair < (H + K) * E // 2)[None, :]
    angle = (rows % sequence)[:, None] * (E // 2) + (pair % (E // 2))[None, :]
    if LOADS == 0:
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    _ready(wait, MODE)
    rstd = _rstd(parts_ptr, n_rows, rows, in_rows, eps, D, PARTS)
    total = _product(
        x_ptr, w_ptr, early, row, rows, in_rows, start, columns, in_columns, D, full, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total *= rstd[:, None]
    if QK_NORM:  # noqa: SIM102 - the one is known when compiled
        if start < (H + K) * E:
            norm_ptr = norms_ptr + tl.where(start < H * E, 0, E)
            norm = tl.load(norm_ptr + within, mask=in_columns, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(total * total, 1) / E + eps)
            total *= scale[:, None] * norm[None, :]
    if LOADS > 0:  # not before: a large tile's product needs the registers
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    a, b = tl.split(tl.reshape(total, [BM, BN // 2, 2]))
    total = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BM, BN])
    to = qkv_ptr + rows.to(tl.int64)[:, None] * wide + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, total.to(qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q,
    qkv_ptr,
    start_of_text,
    start,
    last,
    places,
    powers,
    most,
    divisor,
    total,
    key,
    ROW: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_SEEN: tl.constexpr,
):
    """One more block of keys, from `start` up to `last`; with ALL_SEEN every row sees all of it."""
    keys = start + tl.arange(0, BN)
    element = tl.arange(0, WIDTH)
    offsets = (start_of_text + keys) * ROW + key * E
    k_at = qkv_ptr + offsets[None, :] + element[:, None]
    v_at = qkv_ptr + K * E + offsets[:, None] + element[None, :]
    # what comes later may not have been written yet, and 0 times NaN is NaN
    written = keys < last
    if ALL_SEEN and WIDTH == E:
        k = tl.load(k_at, cache_modifier=".cg")
    elif ALL_SEEN:
        k = tl.load(k_at, mask=(element < E)[:, None], other=0.0, cache_modifier=".cg")
    else:
        mask = written[None, :] & (element < E)[:, None]
        k = tl.load(k_at, mask=mask, other=0.0, cache_modifier=".cg")
    scores = tl.dot(q, k, input_precision="ieee")
    if not ALL_SEEN:
        scores = tl.where(keys[None, :] <= places[:, None], scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1) * powers)
    shrunk = tl.exp2(most - higher)
    weights = tl.exp2(scores * powers - higher[:, None])
    divisor = divisor * shrunk + tl.sum(weights, 1)
    if ALL_SEEN and WIDTH == E:
        v = tl.load(v_at, cache_modifier=".cg")
    elif ALL_SEEN:
        v = tl.load(v_at, mask=(element < E)[None, :], other=0.0, cache_modifier=".cg")
    else:
        mask = written[:, None] & (element < E)[None, :]
        v = tl.load(v_at, mask=mask, other=0.0, cache_modifier=".cg")
    total *= shrunk[:, None]
    total = tl.dot(weights.to(v.dtype), v, total, input_precision="ieee")
    return higher, divisor, total


@triton.jit
def _leave(parts_ptr, chunk, most, divisor, total, BM: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk's part: (BM, WIDTH), then the rows' maxima, then their divisors."""
    row = tl.arange(0, BM)
    to = parts_ptr + chunk * (BM * (WIDTH + 2))
    tl.store(to + row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], total)
    tl.store(to + BM * WIDTH + row, most)
    tl.store(to + BM * (WIDTH + 1) + row, divisor)


@triton.jit
def _put_together(parts_ptr, chunks, BM: tl.constexpr, WIDTH: tl.constexpr):
    """Divisors and totals of all chunks, added in their order."""
    row = tl.arange(0, BM)
    cells = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    most = tl.full([BM], float("-inf"), tl.float32)
    divisor = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, WIDTH], tl.float32)
    for chunk in tl.range(chunks, num_stages=1):
        at = parts_ptr + chunk * (BM * (WIDTH + 2))
        its_most = tl.load(at + BM * WIDTH + row, cache_modifier=".cg")
        its_divisor = tl.load(at + BM * (WIDTH + 1) + row, cache_modifier=".cg")
        its_total = tl.load(at + cells, cache_modifier=".cg")
        higher = tl.maximum(most, its_most)
        shrunk, grown = tl.exp2(most - higher), tl.exp2(its_most - higher)
        divisor = divisor * shrunk + its_divisor * grown
        total = total * shrunk[:, None] + its_total * grown[:, None]
        most = higher
    return divisor, total


@triton.jit
def attention_tile(
    tile,
    wait,
    qkv_ptr,
    mixed_ptr,
    partial_ptr,
    arrived_ptr,
    sequence,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    LOADS: tl.constexpr,
    MODE: tl.constexpr,
):
    """One head for BM rows of one text: softmax(q k^T scale) v over what each row sees, with a
    running maximum (2205.14135). WIDTH is the power of two from 16 on that holds E.

    With CHUNK the tiles are cut further, into chunks of so many keys, a multiple of BM: the last
    chunks of all tiles, then those before, so that run from behind the largest come first. Each
    leaves its part, and the last one to arrive puts them together in their order: the bits are
    always the same ones."""
    tiles_of_text = tl.cdiv(sequence, BM)
    begin = 0
    if CHUNK > 0:
        most_chunks = tl.cdiv(sequence, CHUNK)
        tiles = tl.num_programs(0) // most_chunks
        chunk = most_chunks - 1 - tile // tiles
        tile = tile % tiles
        begin = chunk * CHUNK
    head = tile % H
    text = tile // H // tiles_of_text
    first = tile // H % tiles_of_text * BM
    last = tl.minimum(first + BM, sequence)
    end = last
    if CHUNK > 0:
        end = tl.minimum(begin + CHUNK, last)
    key = H + head // (H // K)  # the key's head in qkv; its value's is K further
    row: tl.constexpr = (H + 2 * K) * E
    places = first + tl.arange(0, BM)
    element = tl.arange(0, WIDTH)
    start_of_text = text.to(tl.int64) * sequence
    rows = (start_of_text + places)[:, None]
    within = head * E + element[None, :]
    q_mask = (places < sequence)[:, None] & (element < E)[None, :]
    _ready(wait, MODE)
    if begin < last:
        q = tl.load(qkv_ptr + rows * row + within, mask=q_mask, other=0.0, cache_modifier=".cg")
        powers = scale * 1.4426950408889634  # of two: 1 / log(2)
        most = tl.full([BM], float("-inf"), tl.float32)
        divisor = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, WIDTH], tl.float32)
        start = begin
        if CHUNK > 0:
            start += tl.maximum(tl.minimum(first + 1, end) - begin, 0) // BN * BN
            for at in tl.range(begin, start, BN, num_stages=LOADS):
                most, divisor, total = _attend(
                    q, qkv_ptr, start_of_text, at, end, places, powers, most, divisor, total, key,
                    row, K, E, BN, WIDTH, True,
                )  # fmt: skip
        for at in tl.range(start, end, BN, num_stages=LOADS):
            most, divisor, total = _attend(
                q, qkv_ptr, start_of_text, at, end, places, powers, most, divisor, total, key, row,
                K, E, BN, WIDTH, False,
            )  # fmt: skip
        whole = True
        if CHUNK > 0:
            chunks = tl.cdiv(last, CHUNK)
            if chunks > 1:
                partial_ptr += tile.to(tl.int64) * (most_chunks * (BM * (WIDTH + 2)))
                _leave(partial_ptr, chunk, most, divisor, total, BM, WIDTH)
                tl.debug_barrier()
                before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
                whole = before == chunks - 1
                if whole:
                    tl.debug_barrier()
                    divisor, total = _put_together(partial_ptr, chunks, BM, WIDTH)
                    tl.store(arrived_ptr + tile, 0)
        if whole:
            mixed = (total / divisor[:, None]).to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + rows * (H * E) + within, mixed, mask=q_mask)


@triton.jit
def add_product_tile(
    tile,
    wait,
    y_ptr,
    w_ptr,
    x_ptr,
    parts_ptr,
    n_rows,
    INNER: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """x += y w^T, x: (N, D), y: (N, INNER): out_proj and down with the residual."""
    row, column = _corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = _place(row, column, n_rows, D, BM, BN)
    early = _early(w_ptr, columns, in_columns, INNER, D, BN, BK, TAIL, LOADS)
    _ready(wait, MODE)
    before = tl.load(
        x_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :],
        mask=in_rows[:, None] & in_columns[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    total = _product(
        y_ptr, w_ptr, early, row, rows, in_rows, column, columns, in_columns, INNER, D, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total += before.to(tl.float32)
    _store_rows(x_ptr, parts_ptr, total, tile, n_rows, rows, columns, in_rows, in_columns, D, BN)


@triton.jit
def gate_up_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    hidden_ptr,
    n_rows,
    eps,
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
):
    """hidden: (N, F) = silu(gate) up (2002.05202), of the normalized rows of x. Rows of w alternate
    between gate and up: a tile has BN of them, so BN / 2 columns of hidden."""
    row, column = _corner(tile, 2 * F, BM, BN)
    rows, columns, in_rows, in_columns = _place(row, column, n_rows, 2 * F, BM, BN)
    early = _early(w_ptr, columns, in_columns, D, 2 * F, BN, BK, TAIL, LOADS)
    _ready(wait, MODE)
    rstd = _rstd(parts_ptr, n_rows, rows, in_rows, eps, D, PARTS)
    total = _product(
        x_ptr, w_ptr, early, row, rows, in_rows, column, columns, in_columns, D, 2 * F, BM, BN, BK,
        TAIL, LOADS, TMA,
    )  # fmt: skip
    total *= rstd[:, None]
    gate, up = tl.split(tl.reshape(total, [BM, BN // 2, 2]))
    hidden = gate / (1 + tl.exp(-gate)) * up
    _, columns, _, in_columns = _place(row, column // 2, n_rows, F, BM, BN // 2)
    to = hidden_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    w_ptr,
    logits_ptr,
    of_ptr,
    status_ptr,
    n_rows,
    x_rows,
    eps,
    D: tl.constexpr,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    LOADS: tl.constexpr,
    TMA: tl.constexpr,
    MODE: tl.constexpr,
):
    """logits: (n_rows, V) of normalized rows of x: those that of, (n_rows,), says; with TMA, of all
    in their order. Its tiles go row tile first: the weights, which may be more than the second
    cache holds, come by once. They are NaN where a status says that the forward was given up."""
    row_tiles = tl.maximum(tl.cdiv(n_rows, BM), 1)
    row, column = tile % row_tiles * BM, tile // row_tiles * BN
    rows, columns, in_rows, in_columns = _place(row, column, n_rows, V, BM, BN)
    of = rows if TMA else tl.load(of_ptr + rows, mask=in_rows, other=0)
    early = _early(w_ptr, columns, in_columns, D, V, BN, BK, TAIL, LOADS)
    _ready(wait, MODE)
    if status_ptr is not None:  # who gave up wrote it before it went on
        status = tl.load(status_ptr, cache_modifier=".cg")
    total = _product(
        x_ptr, w_ptr, early, row, of, in_rows, column, columns, in_columns, D, V, BM, BN, BK, TAIL,
        LOADS, TMA,
    )  # fmt: skip
    # behind the product, or a loop of tiles is no single pipeline
    total *= _rstd(parts_ptr, x_rows, of, in_rows, eps, D, PARTS)[:, None]
    if status_ptr is not None:
        total = tl.where(status == 0, total, float("nan"))
    to = logits_ptr + rows.to(tl.int64)[:, None] * V + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(to, total.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalize_tile(
    tile,
    wait,
    x_ptr,
    parts_ptr,
    normalized_ptr,
    of_ptr,
    n_rows,
    x_rows,
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MODE: tl.constexpr,
):
    """normalized: (n_rows, D), the rows of x that of, (n_rows,), says, over their rms."""
    row, column = _corner(tile, D, BM, BN)
    rows, columns, in_rows, in_columns = _place(row, column, n_rows, D, BM, BN)
    of = tl.load(of_ptr + rows, mask=in_rows, other=0)
    _ready(wait, MODE)
    rstd = _rstd(parts_ptr, x_rows, of, in_rows, eps, D, PARTS)
    mask = in_rows[:, None] & in_columns[None, :]
    at = x_ptr + of.to(tl.int64)[:, None] * D + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    to = normalized_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(to, (x * rstd[:, None]).to(normalized_ptr.dtype.element_ty), mask=mask)
