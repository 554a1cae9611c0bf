"""The tiles of each kind of stage that are worth timing: an estimate ranks them, without a
device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import (
    H200,
    KINDS,
    PRODUCTS,
    Blocking,
    Limits,
    blocks,
    default,
    inner_of,
    padded,
    shared_bytes,
    tilings,
)
from onelaunch.plan import STAGE_KINDS
from onelaunch.plan.tiles import columns_of

WRITES_X = tuple(kind for kind in KINDS if "x" in STAGE_KINDS[kind].writes)
"""They write x in tiles of the same columns."""
MOST = 10
PER_TILE = 4
WARMUP_ROWS = 512

# (block_k, num_stages), the likeliest first
_PIPELINES = (
    (64, 4), (128, 5), (64, 6), (32, 6), (128, 3), (64, 3), (128, 4), (128, 2), (32, 3), (64, 2),
)  # fmt: skip
_PIPELINE_STEP = 0.03  # what each further one counts for in the order
_ACCUMULATORS = (4, 128)  # float32 of a tile that a thread may hold
_SCORES = 64  # the same of attention, whose tile is held twice
_EARLY_WEIGHTS = 320  # of a thread, where all weights are taken at once: 288 at best on an H200
_EARLY_TILE = 1 << 16  # weights of such a tile

# Microseconds of a tile on an H200: a guess for the order, fitted by eye to some sweeps.
_TILE_US = 0.8
_BYTES_PER_US = 90e3
_OPERATIONS_PER_US = 4.5e6
_WRITTEN_PER_US = 200e3
_KEYS_US = 0.5  # a step of attention through its keys


def x_columns(config: ModelConfig, rows: int) -> tuple[int, ...]:
    """The widths of the tiles of x that are worth trying, the rule's first."""
    first = default(config, rows, 2)["down"].columns
    widths = (32, 64, 128) if rows >= WARMUP_ROWS else (32, 64)
    return (first, *(w for w in widths if w != first and w <= padded(config.dim)))


def options(
    config: ModelConfig,
    batch: int,
    sequence: int,
    itemsize: int,
    kind: str,
    x_columns: int,
    limits: Limits = H200,
) -> list[Blocking]:
    """A few blockings of a kind, the rule's first, the likeliest next. `x_columns` is how wide the
    tiles of x are: of a kind that writes x, all are so wide, the rule's too."""
    rule = default(config, batch * sequence, itemsize, limits)[kind]
    if kind in WRITES_X:
        rule = replace(rule, columns=x_columns)
    if kind == "embed":
        return [rule]
    if kind == "attention":
        ranked = _attention(config, batch, sequence, itemsize, limits)
    else:
        ranked = _products(config, batch * sequence, itemsize, kind, x_columns, limits)
    options = [rule]
    if kind == "head":
        options.append(Blocking(128, 128, library=True))
    if kind in PRODUCTS and rule.num_stages and limits.tma:
        options.append(replace(rule, tma=not rule.tma, programs=0))
    if kind in ("out_proj", "down") and batch * sequence < WARMUP_ROWS:
        likely = (rule, *_best(ranked, 2))
        options += [replace(o, warmup_pass=not o.warmup_pass) for o in likely if o.num_stages]
    options += _best(ranked, MOST)
    fitting = [o for o in options if o == rule or fits(config, kind, o, itemsize, limits)]
    return list(dict.fromkeys(fitting))


def fits(
    config: ModelConfig, kind: str, blocking: Blocking, itemsize: int, limits: Limits = H200
) -> bool:
    """Whether a tile has the shared memory and the registers that it needs, as far as that can be
    known without compiling it."""
    b, threads = blocking, blocking.warps * 32
    accumulators = b.rows * b.columns / threads
    if kind == "embed":
        return True
    if kind == "attention":
        few_enough = max(accumulators, b.rows * padded(config.head_dim) / threads) <= _SCORES
    else:
        few_enough = accumulators <= _ACCUMULATORS[1]
        if not b.num_stages:
            weights = b.columns * sum(blocks(inner_of(config, kind), b))
            few_enough &= weights <= _EARLY_TILE and weights / threads <= _EARLY_WEIGHTS
    shared = shared_bytes(config, kind, b, itemsize)
    return few_enough and accumulators >= _ACCUMULATORS[0] and shared <= limits.room


def _best(ranked: Sequence[tuple[float, Blocking]], limit: int) -> list[Blocking]:
    """The likeliest, no more than a few of the same tile."""
    options: list[Blocking] = []
    for _, option in sorted(ranked, key=lambda pair: pair[0]):
        alike = sum((o.rows, o.columns) == (option.rows, option.columns) for o in options)
        if alike < PER_TILE and len(options) < limit:
            options.append(option)
    return options


def _products(
    config: ModelConfig, rows: int, itemsize: int, kind: str, x_columns: int, limits: Limits
) -> list[tuple[float, Blocking]]:
    """Blockings of a product with what they are guessed to take."""
    assert kind in PRODUCTS
    inner, ranked = inner_of(config, kind), []
    for tile_rows, columns in _tiles(config, rows, kind, x_columns):
        probe = {kind: Blocking(tile_rows, columns)}
        step = tilings(config, probe)[kind].columns
        tiles = -(-rows // tile_rows) * -(-columns_of(config, kind) // step)
        moved = inner * (tile_rows + columns) * itemsize
        guess = -(-tiles // limits.multiprocessors) * (
            _TILE_US
            + moved / _BYTES_PER_US
            + 2 * inner * tile_rows * columns / _OPERATIONS_PER_US
            + tile_rows * columns * 2 * itemsize / _WRITTEN_PER_US
        )
        variants = [
            variant
            for variant in _variants(tile_rows, columns, inner, rows, kind == "head", limits.tma)
            if fits(config, kind, variant, itemsize, limits)
        ]
        ranked += [(guess * (1 + _PIPELINE_STEP * i), v) for i, v in enumerate(variants)]
    return ranked


def _tiles(config: ModelConfig, rows: int, kind: str, x_columns: int) -> Iterator[tuple[int, int]]:
    least = 64 if rows >= WARMUP_ROWS else 32 if rows >= 64 else 16
    if kind in WRITES_X:
        widths: tuple[int, ...] = (x_columns,)
    elif kind == "qkv" and config.qk_norm:
        widths = (padded(config.head_dim),)
    else:
        widest = padded(columns_of(config, kind) * (2 if kind == "gate_up" else 1), 32)
        widths = tuple(w for w in (32, 64, 128, 256) if w <= widest)
    for tile_rows in (16, 32, 64, 128):
        if least <= tile_rows <= padded(rows):
            for columns in widths:
                if kind != "head" or tile_rows < 64 or columns >= min(128, widths[-1]):
                    yield tile_rows, columns


def _variants(
    rows: int, columns: int, inner: int, all_rows: int, head: bool, tma: bool
) -> Iterator[Blocking]:
    """Ways through the inner dimension and numbers of warps, the likeliest first."""
    likely, other = (4, 8) if rows * columns <= 64 * 128 else (8, 4)
    if all_rows < WARMUP_ROWS:
        yield Blocking(rows, columns, num_stages=0, warps=likely)
    whole = [p for p in _PIPELINES if p[1] <= -(-inner // p[0])]
    # blocks that the inner dimension is a multiple of need no masks
    whole.sort(key=lambda pipeline: inner % pipeline[0] != 0)
    ways = [(*way, likely) for way in whole]
    ways[3:3] = [(*way, other) for way in whole[:1]]
    for way in ways:
        blocking = Blocking(rows, columns, *way, tma=tma)
        if head and tma and rows * columns >= 128 * 128:
            blocking = replace(blocking, programs=1 if blocking.warps == 8 else 2)
        yield blocking


def _attention(
    config: ModelConfig, batch: int, sequence: int, itemsize: int, limits: Limits
) -> list[tuple[float, Blocking]]:
    """Blockings of attention with what they are guessed to take."""
    width, ranked = padded(config.head_dim), []
    for rows in (16, 32, 64, 128):
        if rows > padded(sequence) or (rows < 32 and sequence >= WARMUP_ROWS):
            continue
        tiles = batch * -(-sequence // rows) * config.n_heads
        for keys in (32, 64, 128, 256):
            if keys > padded(sequence, 32):
                continue
            steps = -(-sequence // keys)
            step = _KEYS_US + 4 * rows * keys * width / _OPERATIONS_PER_US
            longest, mean = _TILE_US + steps * step, _TILE_US + (steps + 1) / 2 * step
            guess = max(longest, tiles / limits.multiprocessors * mean)
            chunks = [c for c in (256, 512) if max(rows, keys) <= c < sequence and rows >= 64]
            variants = [
                option
                for warps in (4, 8)
                for num_stages in (2, 3, 1)
                for chunk in (*chunks, 0)
                if fits(
                    config,
                    "attention",
                    option := Blocking(rows, keys, num_stages=num_stages, warps=warps, chunk=chunk),
                    itemsize,
                    limits,
                )
                and (warps == 4 or rows >= 64)
                and num_stages <= steps + 1
            ]
            ranked += [(guess * (1 + _PIPELINE_STEP * i), v) for i, v in enumerate(variants)]
    return ranked
