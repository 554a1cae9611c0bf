"""Choose the RMSNorm kernel and its tile from the shape: pure functions, no device, no tensors.

A tile is `rows_per_tile` whole rows. A CTA of the forward computes one tile; a CTA of the backward
computes every `grid`-th tile and keeps one row of float32 dW partials. The kernel is `row` if a
tile is one row, `block` if it is several, `chunked` if a row exceeds the registers of a CTA and is
read twice, in chunks.

There are two rules. `source` is the block-row rule as published (linkedin/Liger-Kernel, pull
request 1238): 16 rows per tile and 4 warps if the padded width is at most 512 and there are at
least 4,096 rows, one CTA per multiprocessor in the backward; rows of more than 16,384 columns are
chunked as in ours. `tuned` is ours: blocks from a number of rows per multiprocessor on; a tile that
depends on the width alone, so that the bits of a row do not depend on other rows as long as the
kernel is the same; and a backward grid of a few CTAs per multiprocessor. (Some widths have several
backward tiles, by rows; the number of threads that sum a row is the same in all of them.) Forcing
`block` on a width whose tile is one row gives that tile.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_MODES = ("auto", "row", "block")
RULES = ("tuned", "source")

# Constants of the published rule, and the warps of its kernels by padded width.
BLOCK_ROW_MAX_BLOCK_SIZE = 512
BLOCK_ROW_MIN_ROWS = 4096
BLOCK_ROW = 16
SOURCE_WARPS = ((8192, 16), (2048, 8), (0, 4))

# Ours. Tuned on an H200 (132 multiprocessors), 2026-11-21, bfloat16, 28 shapes; docs/log.md has
# what was tried, benchmarks/records/nvidia-h200/rms-norm.json the result.
# Each entry: the largest padded width, then rows per tile, warps, and whether the weight is loaded
# before the reduction.
FORWARD_BLOCK = (
    (64, (16, 4, True)),
    (128, (8, 2, True)),
    (256, (4, 2, True)),
    (512, (4, 2, False)),
    (1024, (2, 4, True)),
    (2048, (1, 4, True)),
    (4096, (1, 8, True)),
)
# Widths of three times a power of two: three segments of that instead of padding to four.
FORWARD_THREE_SEGMENTS = {768: (1, 1, True), 3072: (1, 4, True)}
FORWARD_ROW_ELEMENTS_PER_WARP = 512
# Backward entries also have pipeline stages and CTAs per multiprocessor, and apply from a number of
# rows per multiprocessor on. In all tiles of a width the same number of threads sums a row.
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
# With fewer rows per multiprocessor than this `auto` gives every row its own CTA: blocks would
# leave multiprocessors idle, and take up to 0.6 us more
# (benchmarks/records/nvidia-h200/rms-norm-threshold.json).
BLOCK_MIN_ROWS_PER_MULTIPROCESSOR = 8
# Pipelined loads use shared memory: this is half of an Ampere multiprocessor's, and all of a
# consumer card's.
MAX_PIPELINE_BYTES = 96 * 1024

# Wider rows are read twice, in chunks. In the forward the second read comes from a cache, which is
# 1 to 2% faster than holding a row of 8,192 or 16,384 columns in registers.
MAX_TILE_COLUMNS = 16384
FORWARD_MAX_TILE_COLUMNS = 4096
FORWARD_MIN_CHUNKS = 2
CHUNK_COLUMNS = 8192  # at most
CHUNKED_BACKWARD = (2, 4096, 8)  # rows per tile, columns per chunk, warps
MAX_COLUMNS = 262_144
MAX_GRID = 2**31 - 1
MAX_WARPS = 16

# The second backward launch sums the partials: columns per CTA, partials per iteration, warps. Up
# to 2,048 columns it is a dependent launch, where the device has them; beyond, that is slower.
REDUCE_NARROW_MAX_COLUMNS = 2048
REDUCE_NARROW = (8, 1024, 8)
REDUCE_WIDE = (16, 256, 8)


@dataclass(frozen=True)
class Plan:
    """One launch.

    Backward: `partials` is the number of float32 dW rows that it writes, `stages` the depth of its
    software pipeline (1: none). Forward: `weight_first` is whether the weight is loaded before the
    reduction, `segments` how many times `block_columns` make a row."""

    kernel: str
    rows_per_tile: int
    block_columns: int
    warps: int
    grid: int
    partials: int = 0
    stages: int = 1
    weight_first: bool = False
    segments: int = 1


@dataclass(frozen=True)
class ReducePlan:
    """The launch that sums the partials of dW: a CTA sums `block_columns` columns, `block_partials`
    rows of partials per iteration; `dependent` is whether it is a programmatic dependent launch."""

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
    """Plan the forward of `rows` rows of `columns` elements of `element_bytes` bytes."""
    width = _check(rows, columns, row_mode, rule)
    if width > (MAX_TILE_COLUMNS if rule == "source" else FORWARD_MAX_TILE_COLUMNS):
        chunk = min(CHUNK_COLUMNS, width // FORWARD_MIN_CHUNKS)
        return Plan("chunked", 1, chunk, MAX_WARPS, rows)
    segments, weight_first = 1, False
    if rule == "source":
        rows_per_tile = BLOCK_ROW if _source_block(rows, width, row_mode) else 1
        warps = 4 if rows_per_tile > 1 else _source_warps(width)
    elif columns in FORWARD_THREE_SEGMENTS:
        (rows_per_tile, warps, weight_first), segments = FORWARD_THREE_SEGMENTS[columns], 3
    else:
        rows_per_tile, warps, first = _entry(FORWARD_BLOCK, width)
        weight_first = bool(first)
        if not _use_blocks(row_mode, rows, multiprocessors):
            rows_per_tile = 1
            warps = _clamp(width // FORWARD_ROW_ELEMENTS_PER_WARP, 1, MAX_WARPS)
    name = "block" if rows_per_tile > 1 else "row"
    block = columns // segments if segments > 1 else width
    grid = _cdiv(rows, rows_per_tile)
    return Plan(
        name, rows_per_tile, block, warps, grid, weight_first=weight_first, segments=segments
    )


def backward_plan(
    rows: int,
    columns: int,
    element_bytes: int,
    multiprocessors: int,
    row_mode: str = "auto",
    rule: str = "tuned",
) -> Plan:
    """Plan the backward launch for dX and the partials of dW."""
    width = _check(rows, columns, row_mode, rule)
    if width > MAX_TILE_COLUMNS:
        rows_per_tile, chunk, warps = CHUNKED_BACKWARD
        grid = min(_cdiv(rows, rows_per_tile), multiprocessors)
        return Plan("chunked", rows_per_tile, chunk, warps, grid, grid)
    if rule == "source":
        rows_per_tile = BLOCK_ROW if _source_block(rows, width, row_mode) else 1
        warps = 4 if rows_per_tile > 1 else _source_warps(width)
        stages, ctas = 1, 1
    else:
        by_rows = next(entries for max_width, entries in BACKWARD_BLOCK if width <= max_width)
        rows_per_tile, warps, stages, ctas = next(
            entry for min_rows, entry in reversed(by_rows) if rows >= min_rows * multiprocessors
        )
        if not _use_blocks(row_mode, rows, multiprocessors):
            rows_per_tile, warps, stages, ctas = _entry(BACKWARD_ROW, width)
        stages = _fitting_stages(stages, 2 * rows_per_tile * width * element_bytes)
    grid = min(_cdiv(rows, rows_per_tile), multiprocessors * ctas)
    name = "block" if rows_per_tile > 1 else "row"
    return Plan(name, rows_per_tile, width, warps, grid, grid, stages)


def reduce_plan(partials: int, columns: int) -> ReducePlan:
    """Plan the launch that sums `partials` rows of dW partials, always in the same order."""
    narrow = columns <= REDUCE_NARROW_MAX_COLUMNS
    block_columns, block_partials, warps = REDUCE_NARROW if narrow else REDUCE_WIDE
    block_partials = min(block_partials, max(16, padded(partials)))
    return ReducePlan(block_columns, block_partials, warps, _cdiv(columns, block_columns), narrow)


def padded(columns: int) -> int:
    """Return the smallest power of two that is at least `columns`."""
    return 1 << (columns - 1).bit_length()


def _check(rows: int, columns: int, row_mode: str, rule: str) -> int:
    if row_mode not in ROW_MODES:
        raise ValueError(f"row_mode must be one of {', '.join(ROW_MODES)}, not {row_mode!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    if rows < 1:
        raise ValueError(f"{rows} rows: there must be at least 1")
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"rows of 1 to {MAX_COLUMNS} columns are supported, not {columns}")
    return padded(columns)


def _source_block(rows: int, width: int, row_mode: str) -> bool:
    if row_mode == "row" or width > BLOCK_ROW_MAX_BLOCK_SIZE:
        return False
    return row_mode == "block" or rows >= BLOCK_ROW_MIN_ROWS


def _source_warps(width: int) -> int:
    return next(warps for min_width, warps in SOURCE_WARPS if width >= min_width)


def _use_blocks(row_mode: str, rows: int, multiprocessors: int) -> bool:
    if rows > MAX_GRID:
        return True
    if row_mode != "auto":
        return row_mode == "block"
    return rows >= BLOCK_MIN_ROWS_PER_MULTIPROCESSOR * multiprocessors


def _entry(table: tuple[tuple[int, tuple[int, ...]], ...], width: int) -> tuple[int, ...]:
    return next(entry for max_width, entry in table if width <= max_width)


def _fitting_stages(stages: int, tile_bytes: int) -> int:
    """Limit the pipeline: n stages keep n - 1 tiles of x and dY in shared memory."""
    return max(1, min(stages, MAX_PIPELINE_BYTES // tile_bytes + 1))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
