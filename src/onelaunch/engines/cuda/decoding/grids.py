"""The layout of a launch that writes many tokens: sequences in groups of CTAs, and what a CTA's
shared memory has room for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.program import limits_of

MAX_SEQUENCES = 64
"""Of a launch."""
FEW, MANY, SEVERAL = 8, 16, 32
"""Sequences of a group of CTAs: FEW, but MANY in a launch of more than SEVERAL where the weights
have up to CACHED_BYTES, which each group then reads from the L2."""
CACHED_BYTES = 40 << 20
SHARED_BYTES = 227 << 10
"""Of a CTA, where the compute capability is 9.0."""
WARPS, MORE_WARPS = 8, 4
REPLICAS = 8
"""Of each word, where all multiprocessors read it."""
SLOT_BYTES = 16384
"""Of a slot of the ring, about."""
_UNIT_BYTES = 1024
"""Of 16 rows of 32 numbers: tiles have some."""
MIN_SLOTS, MAX_SLOTS = 4, 32
CHUNKS = 8
"""Of a sequence's context, about, at most."""
TILED = False
"""Whether one sequence, too, is written by tiles, where that can be."""
_SUMS_PITCH = 20  # of texts.cu
ROUNDS, BINS = 8, 256  # of search.cu


class Grid(NamedTuple):
    """Of a launch: sequences of a group, and its CTAs; how many groups there are. `tiles`: whether
    products are on tensor cores, by texts.cu."""

    sequences: int
    ctas: int
    groups: int = 1
    tiles: bool = True

    @property
    def replicas(self) -> int:
        """Of each word of a group."""
        share = max(1, REPLICAS // self.groups)
        return 1 << (share.bit_length() - 1)

    def alone(self, config: ModelConfig) -> bool:
        """Whether a warp attends alone: where all of a CTA together would have too many turns."""
        return self.sequences > 1 and self.sequences * config.n_heads > 2 * self.ctas

    def chunks(self, config: ModelConfig) -> int:
        """Of a sequence's context, about, at most: as many as are attended to at once."""
        at_once = self.ctas * (WARPS if self.alone(config) else 1)
        return max(1, min(CHUNKS, at_once // (self.sequences * config.n_heads)))

    def passes(self, config: ModelConfig, max_len: int) -> int:
        """The length of a chunk of one sequence: how often a CTA's warps take 16 positions each."""
        return -(-max_len // (16 * WARPS * self.chunks(config)))


def grid_for(
    config: ModelConfig,
    dtype: torch.dtype,
    max_batch: int,
    multiprocessors: int,
    shared_bytes: int = SHARED_BYTES,
) -> Grid:
    """For so many sequences at once; of those that there are one that fits, if any does."""
    if max_batch == 1:
        return Grid(1, multiprocessors, tiles=TILED and can_tile(config, dtype))
    if max_batch <= FEW:
        return Grid(FEW, multiprocessors)
    few_first = max_batch <= SEVERAL or _weight_bytes(config, dtype) > CACHED_BYTES
    grids = []
    for of_group in (FEW, MANY) if few_first else (MANY, FEW):
        groups = -(-max_batch // of_group)
        grids.append(Grid(of_group, max(1, multiprocessors // groups), groups))
    fitting = (grid for grid in grids if fits(config, dtype, grid, shared_bytes))
    return next(fitting, grids[0])


def fits(config: ModelConfig, dtype: torch.dtype, grid: Grid, shared_bytes: int) -> bool:
    """Whether a CTA's part has room, where tokens are drawn, which needs more."""
    return slots(config, dtype, grid, shared_bytes, draws=True) >= MIN_SLOTS


def _weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """That a token reads."""
    c = config
    of_layer = c.dim * (2 * c.q_dim + 2 * c.kv_dim + 3 * c.hidden_dim)
    return (c.n_layers * of_layer + c.vocab_size * c.dim) * dtype.itemsize


def can_tile(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether products can be on tensor cores."""
    return dtype != torch.float32 and config.dim % 32 == config.q_dim % 32 == 0


def padded(config: ModelConfig, grid: Grid) -> ModelConfig:
    """As texts.cu has the model: hidden numbers in multiples of 32, some of them zero."""
    if not grid.tiles:
        return config
    return config.with_(hidden_dim=-(-config.hidden_dim // 32) * 32)


def why_not(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, max_batch: int = 1
) -> str | None:
    """Why so many sequences of a model cannot be written in one launch; None where they can."""
    c = config
    if max_batch > MAX_SEQUENCES:
        return f"one launch writes at most {MAX_SEQUENCES} sequences"
    if c.vocab_size >= 1 << 18:
        return "its vocabulary is too large"
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "it needs compute capability 9.0"
    if max_batch > 1 and not can_tile(c, dtype):
        if dtype == torch.float32:
            return "several sequences at once are of 16-bit numbers"
        return "its widths are not multiples of 32"
    limits = limits_of(device)
    grid = grid_for(c, dtype, max_batch, limits.multiprocessors, limits.shared_bytes)
    if c.dim % 8 or c.head_dim % 8 or (c.hidden_dim % 4 and not grid.tiles):
        return "its widths are not multiples of 8"
    if not fits(c, dtype, grid, limits.shared_bytes):
        return "it does not fit into shared memory"
    return nvrtc.why_not()


def slot_bytes(config: ModelConfig, itemsize: int, grid: Grid) -> int:
    """Of a slot of the ring. Where there are no tiles, 16 rows of the head or some more, or eight
    of a wide one; and the rows that a warp takes at once of the other weights."""
    c = config
    if grid.tiles:
        return tile_units(padded(c, grid), grid.sequences) * _UNIT_BYTES
    rows = 16 * c.dim * itemsize
    rows = -(-SLOT_BYTES // rows) * rows if rows <= 1.5 * SLOT_BYTES else rows // 2
    of_warp = -(-c.dim // (grid.ctas * WARPS))
    return max(rows, min(4, of_warp + of_warp % 2) * max(c.hidden_dim, c.q_dim) * itemsize)


def slots(
    config: ModelConfig,
    dtype: torch.dtype,
    grid: Grid,
    shared_bytes: int,
    draws: bool,
) -> int:
    """Slots of the ring that a CTA has room for, with the rest of `Shared`."""
    c, n, ctas = padded(config, grid), grid.sequences, grid.ctas
    alone = grid.tiles and grid.alone(c)
    numbers = n * (c.dim + 64 if grid.tiles else c.dim + max(c.q_dim, c.hidden_dim))
    floats = (1 if alone else WARPS) * (c.head_dim + 2)
    floats += n * (3 + draws) * (ctas + (8 if grid.tiles else 1) * WARPS)  # what is best
    of_head = -(-c.vocab_size // ctas) + 2  # rows, and a bit of each
    if grid.tiles:
        even = max(_blocks(c.q_dim + 2 * c.kv_dim, ctas), _blocks(2 * c.hidden_dim, ctas))
        floats += (even + _blocks(c.dim, ctas)) * WARPS * n * _SUMS_PITCH + (2 * WARPS + 8) * n
        if draws:
            floats += n * (of_head // 32 + 40) + 3 * BINS * WARPS
    else:
        floats += max(16, -(-c.dim // ctas)) + 8  # rows of x
        if draws:
            floats += of_head + of_head // 32 + (2 * ROUNDS + 3) * BINS + 3 * (ctas + WARPS) + 32
    taken = numbers * dtype.itemsize + 4 * floats + 2048  # alignment, barriers and counters
    return min(MAX_SLOTS, (shared_bytes - taken) // slot_bytes(c, dtype.itemsize, grid))


def tile_units(config: ModelConfig, sequences: int) -> int:
    """Of the largest tile, as `Tiles` of texts.cu has them."""
    largest = 0
    for width in (config.dim, config.q_dim, config.hidden_dim):
        units = width // 32
        of_warp = -(-units // WARPS)
        at_once = min(of_warp, 16 // -(-sequences // 8))
        while of_warp % at_once:
            at_once -= 1
        warps, most = -(-units // at_once), max(SLOT_BYTES // _UNIT_BYTES // at_once, 1)
        largest = max(largest, min(-(-warps // -(-warps // most)) * at_once, units))
    return largest


def _blocks(rows: int, ctas: int) -> int:
    """Of 16 rows, that a CTA has at most."""
    blocks = -(-rows // 16)
    return -(-blocks // min(ctas, blocks))
