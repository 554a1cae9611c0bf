"""Which kernel normalizes a given number of rows, and in what shape: pure, no device, no tensors.

Words: a tile is `rows_per_tile` whole rows. A forward program computes one tile; a backward program
walks every `grid`-th tile and keeps one row of float32 dW partials. The kernel is called `row`
where a tile is one row, `block` where it is several, `chunked` where one row does not fit a
program's registers and is walked twice, piece by piece.

Two rules stand side by side. `source` is the block-row rule as published
(linkedin/Liger-Kernel, pull request 1238): 16 rows a tile and 4 warps where the padded width is at
most 512 and there are 4,096 rows or more, one program a multiprocessor backward; rows beyond 16,384
columns are chunked as ours are. `tuned` is ours: blocks from a number of rows for each
multiprocessor on, a tile that depends on the width alone, so that a row's bits do not depend on the
rows beside it as long as the path is the same, and a backward grid of a few programs a
multiprocessor. (Some widths have several backward tiles, by rows; as many threads add up a row in
each.) Forcing `block` on a width whose tile is one row gives that tile.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_MODES = ("auto", "row", "block")
RULES = ("tuned", "source")

# The published rule's own constants, and the warps of the kernels that it chooses between.
BLOCK_ROW_MAX_BLOCK_SIZE = 512
BLOCK_ROW_MIN_ROWS = 4096
BLOCK_ROW = 16
SOURCE_WARPS = ((8192, 16), (2048, 8), (0, 4))

# Ours. Tuned on an H200 (132 multiprocessors), 2026-11-21, bfloat16, 28 shapes; what was tried is
# in docs/log.md, what it gives in benchmarks/records/nvidia-h200/rms-norm.json.
# Each entry: the padded width up to which it holds, then rows a tile, warps, and whether the weight
# is asked for before the reduction.
FORWARD_BLOCK = (
    (64, (16, 4, True)),
    (128, (8, 2, True)),
    (256, (4, 2, True)),
    (512, (4, 2, False)),
    (1024, (2, 4, True)),
    (2048, (1, 4, True)),
    (4096, (1, 8, True)),
)
# A width of three times a power of two, held as three parts of that and not padded to four.
FORWARD_THREE_PARTS = {768: (1, 1, True), 3072: (1, 4, True)}
FORWARD_ROW_ELEMENTS_PER_WARP = 512
# Backward also: pipeline stages, programs a multiprocessor; and for each width the rows for each
# multiprocessor from which an entry holds. As many threads add up a row in all of a width's tiles.
BACKWARD_BLOCK = (
    (64, ((0, (64, 4, 1, 4)), (48, (32, 2, 1, 8)), (768, (32, 4, 3, 3)))),
    (128, ((0, (8, 1, 4, 4)),)),
    (256, ((0, (4, 1, 3, 8)), (48, (4, 1, 3, 6)), (96, (4, 1, 3, 7)))),
    (512, ((0, (2, 2, 4, 4)),)),
    (1024, ((0, (2, 2, 3, 4)),)),
    (2048, ((0, (2, 4, 3, 2)),)),
    (4096, ((0, (2, 8, 3, 1)),)),
    (8192, ((0, (1, 8, 3, 1)),)),
    (16384, ((0, (1, 16, 2, 1)),)),
)
BACKWARD_ROW = (
    (1024, (1, 1, 3, 8)),
    (2048, (1, 2, 3, 4)),
    (4096, (1, 4, 3, 2)),
    (8192, (1, 8, 3, 1)),
    (16384, (1, 16, 2, 1)),
)
# With fewer rows than this for each multiprocessor `auto` gives every row a program of its own:
# blocks then leave multiprocessors idle, and lose up to 0.6 us
# (benchmarks/records/nvidia-h200/rms-norm-threshold.json).
BLOCK_MIN_ROWS_PER_MULTIPROCESSOR = 8
# Pipelined loads wait in shared memory; half an Ampere multiprocessor's, and all of a consumer
# card's.
MAX_PIPELINE_BYTES = 96 * 1024

# One tile holds a row up to here; wider rows are walked twice, in chunks. Forward the second time
# is from a cache, and 1 to 2% faster than holding a row of 8,192 or 16,384 columns.
MAX_TILE_COLUMNS = 16384
FORWARD_MAX_TILE_COLUMNS = 4096
FORWARD_LEAST_CHUNKS = 2
CHUNK_COLUMNS = 8192  # at most
CHUNKED_BACKWARD = (2, 4096, 8)  # rows a tile, columns a chunk, warps
MAX_COLUMNS = 262_144
MAX_PROGRAMS = 2**31 - 1
MAX_WARPS = 16

# The second backward launch adds the partials: columns a program, partials read at a time, warps.
# Up to 2,048 columns it is scheduled before the first has ended, where the device can do that;
# beyond, it is faster after.
REDUCE_NARROW_MAX_COLUMNS = 2048
REDUCE_NARROW = (8, 1024, 8)
REDUCE_WIDE = (16, 256, 8)


@dataclass(frozen=True)
class Plan:
    """One launch. `partials` is the number of float32 dW rows that a backward launch writes, 0
    forward; `stages` is the depth of its software pipeline, 1 being none; `weight_first` is whether
    a forward launch asks for the weight before it reduces, `parts` how many times `block_columns`
    make a row of it."""

    kernel: str
    rows_per_tile: int
    block_columns: int
    warps: int
    grid: int
    partials: int = 0
    stages: int = 1
    weight_first: bool = False
    parts: int = 1


@dataclass(frozen=True)
class ReducePlan:
    """The launch that adds the partials of dW: a program adds `block_columns` columns,
    `block_partials` rows of partials at a time; `dependent` is whether it may be scheduled before
    the launch ahead of it has ended."""

    block_columns: int
    block_partials: int
    warps: int
    grid: int
    dependent: bool


def forward_plan(
    rows: int,
    columns: int,
    element_bytes: int,
    multiprocessors: int,
    row_mode: str = "auto",
    rule: str = "tuned",
) -> Plan:
    """The launch for y of `rows` rows of `columns` elements of `element_bytes` bytes."""
    width = _check(rows, columns, row_mode, rule)
    if width > (MAX_TILE_COLUMNS if rule == "source" else FORWARD_MAX_TILE_COLUMNS):
        chunk = min(CHUNK_COLUMNS, width // FORWARD_LEAST_CHUNKS)
        return Plan("chunked", 1, chunk, MAX_WARPS, rows)
    parts, weight_first = 1, False
    if rule == "source":
        rows_per_tile = BLOCK_ROW if _source_block(rows, width, row_mode) else 1
        warps = 4 if rows_per_tile > 1 else _source_warps(width)
    elif columns in FORWARD_THREE_PARTS:
        (rows_per_tile, warps, weight_first), parts = FORWARD_THREE_PARTS[columns], 3
    else:
        rows_per_tile, warps, first = _entry(FORWARD_BLOCK, width)
        weight_first = bool(first)
        if not _by_blocks(row_mode, rows, multiprocessors):
            rows_per_tile = 1
            warps = _clamp(width // FORWARD_ROW_ELEMENTS_PER_WARP, 1, MAX_WARPS)
    name = "block" if rows_per_tile > 1 else "row"
    block = columns // parts if parts > 1 else width
    grid = _cdiv(rows, rows_per_tile)
    return Plan(name, rows_per_tile, block, warps, grid, weight_first=weight_first, parts=parts)


def backward_plan(
    rows: int,
    columns: int,
    element_bytes: int,
    multiprocessors: int,
    row_mode: str = "auto",
    rule: str = "tuned",
) -> Plan:
    """The launch for dX and the partials of dW."""
    width = _check(rows, columns, row_mode, rule)
    if width > MAX_TILE_COLUMNS:
        rows_per_tile, chunk, warps = CHUNKED_BACKWARD
        grid = min(_cdiv(rows, rows_per_tile), multiprocessors)
        return Plan("chunked", rows_per_tile, chunk, warps, grid, grid)
    if rule == "source":
        rows_per_tile = BLOCK_ROW if _source_block(rows, width, row_mode) else 1
        warps = 4 if rows_per_tile > 1 else _source_warps(width)
        stages, programs = 1, 1
    else:
        by_rows = next(entries for most, entries in BACKWARD_BLOCK if width <= most)
        rows_per_tile, warps, stages, programs = next(
            entry for least, entry in reversed(by_rows) if rows >= least * multiprocessors
        )
        if not _by_blocks(row_mode, rows, multiprocessors):
            rows_per_tile, warps, stages, programs = _entry(BACKWARD_ROW, width)
        stages = _fitting_stages(stages, 2 * rows_per_tile * width * element_bytes)
    grid = min(_cdiv(rows, rows_per_tile), multiprocessors * programs)
    name = "block" if rows_per_tile > 1 else "row"
    return Plan(name, rows_per_tile, width, warps, grid, grid, stages)


def reduce_plan(partials: int, columns: int) -> ReducePlan:
    """The launch that adds `partials` rows of dW partials, always in the same order."""
    narrow = columns <= REDUCE_NARROW_MAX_COLUMNS
    block_columns, block_partials, warps = REDUCE_NARROW if narrow else REDUCE_WIDE
    block_partials = min(block_partials, max(16, padded(partials)))
    return ReducePlan(block_columns, block_partials, warps, _cdiv(columns, block_columns), narrow)


def padded(columns: int) -> int:
    """The power of two that holds `columns`."""
    return 1 << (columns - 1).bit_length()


def _check(rows: int, columns: int, row_mode: str, rule: str) -> int:
    if row_mode not in ROW_MODES:
        raise ValueError(f"row_mode must be one of {', '.join(ROW_MODES)}, not {row_mode!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if rows < 1:
        raise ValueError(f"there is nothing to plan for {rows} rows")
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"rows of 1 to {MAX_COLUMNS} columns are supported, not {columns}")
    return padded(columns)


def _source_block(rows: int, width: int, row_mode: str) -> bool:
    if row_mode == "row" or width > BLOCK_ROW_MAX_BLOCK_SIZE:
        return False
    return row_mode == "block" or rows >= BLOCK_ROW_MIN_ROWS


def _source_warps(width: int) -> int:
    return next(warps for least, warps in SOURCE_WARPS if width >= least)


def _by_blocks(row_mode: str, rows: int, multiprocessors: int) -> bool:
    if rows > MAX_PROGRAMS:
        return True
    if row_mode != "auto":
        return row_mode == "block"
    return rows >= BLOCK_MIN_ROWS_PER_MULTIPROCESSOR * multiprocessors


def _entry(table: tuple[tuple[int, tuple[int, ...]], ...], width: int) -> tuple[int, ...]:
    return next(entry for most, entry in table if width <= most)


def _fitting_stages(stages: int, tile_bytes: int) -> int:
    """A pipeline of n stages holds n - 1 tiles of x and dY in shared memory."""
    return max(1, min(stages, MAX_PIPELINE_BYTES // tile_bytes + 1))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
