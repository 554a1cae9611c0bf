"""The forms of a training step: tiles, blocks, logits at once and streams, as plain data.

`rule` chooses them from the shape alone, with what measured fastest on an H200; tuning/ measures
others. Nothing here needs a device or Triton. N rows (sequences times length), S length, D model
width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from onelaunch.config import ModelConfig
from onelaunch.plan.training import LOGITS

MULTIPROCESSORS = 132  # of an H100 or H200


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def ctas(n: int, per_cta: int) -> int:
    """Return how many CTAs n things take, so many of them in each."""
    return -(-n // per_cta)


class AttentionBlocks(NamedTuple):
    """Queries or keys of a CTA, of those that meet them how many at once, and its warps."""

    rows: int
    columns: int
    num_stages: int
    num_warps: int


@dataclass(frozen=True)
class ProductTile:
    """How a product with SwiGLU in its epilogue is divided.

    A tile is `block_m` rows by `block_f` columns of the hidden layer, its epilogue goes by `parts`
    of the columns. The grid has `ctas_per_sm` persistent CTAs per multiprocessor, or with 0 one CTA
    per tile. `flatten` makes one pipelined loop of tiles and steps. `tma_stores` is of the forward
    alone, `ahead` of the backward: how early gates and ups are loaded, see its kernel.
    `max_registers` per thread lets two CTAs of eight warps fit where it is 128."""

    block_m: int
    block_f: int
    block_k: int
    num_stages: int
    num_warps: int
    ctas_per_sm: int
    parts: int = 1
    flatten: bool = False
    tma_stores: bool = False
    ahead: int = 0
    max_registers: int | None = None

    def grid(self, N: int, F: int) -> tuple[int]:
        """Return how many CTAs take the tiles."""
        tiles = ctas(N, self.block_m) * ctas(F, self.block_f)
        return (min(tiles, self.ctas_per_sm * MULTIPROCESSORS or tiles),)

    def options(self) -> dict[str, int | None]:
        """Return the kernels' common constants."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_F": self.block_f, "BLOCK_K": self.block_k,
            "PARTS": self.parts, "FLATTEN": self.flatten, "num_stages": self.num_stages,
            "num_warps": self.num_warps, "maxnreg": self.max_registers,
        }  # fmt: skip


MANY_ROWS = ProductTile(128, 128, 64, 4, 8, 1, parts=2, flatten=True)
FEW_ROWS = ProductTile(64, 32, 64, 5, 4, 0)
FEW_ROWS_BACK = ProductTile(64, 32, 128, 3, 4, 0, ahead=2)
ENOUGH_TILES = 4  # of each multiprocessor
LITTLE_WORK = 2e9  # operations of a product of gates and ups that launches cost more than


@dataclass(frozen=True)
class TrainingForms:
    """The forms of a micro-step.

    swiglu_forward, swiglu_backward: tiles of the products with SwiGLU in their epilogue; None for
        a library's product and a SwiGLU of its own.
    attention_forward, attention_backward: blocks; None where a library does attention.
    logits: about how many numbers of them exist at once.
    side_stream: whether the gradients of weights are computed on a stream of their own.
    """

    swiglu_forward: ProductTile | None
    swiglu_backward: ProductTile | None
    attention_forward: AttentionBlocks | None
    attention_backward: AttentionBlocks | None
    logits: int
    side_stream: bool


def rule(
    config: ModelConfig,
    sequences: int,
    length: int,
    dtype: torch.dtype,
    fuses: bool,
) -> TrainingForms:
    """Return the forms that need no measuring. `fuses`: products may have SwiGLU in their epilogue,
    see `swiglu_launches.can_fuse`."""
    c = config
    swiglu: tuple[ProductTile | None, ProductTile | None] = None, None
    attention: tuple[AttentionBlocks | None, AttentionBlocks | None] = None, None
    if fuses:
        swiglu = swiglu_tiles(sequences * length, c.dim, c.hidden_dim)
    if has_own_attention(c, dtype):
        shape = sequences, length, c.n_heads, c.head_dim
        attention = attention_blocks(*shape, False), attention_blocks(*shape, True)
    return TrainingForms(*swiglu, *attention, LOGITS, side_stream=True)


def has_own_attention(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether kernels of ours do attention, else a library: wide heads in float32 have no room."""
    return dtype != torch.float32 or config.head_dim <= 64


def swiglu_tiles(N: int, D: int, F: int) -> tuple[ProductTile | None, ProductTile | None]:
    """Return the tiles of the forward and the backward: of little work both fused, of much the
    forward alone. With many rows the backward's epilogue costs more than it saves."""
    if 4 * N * D * F <= LITTLE_WORK:
        return FEW_ROWS, FEW_ROWS_BACK
    tiles = ctas(N, MANY_ROWS.block_m) * ctas(F, MANY_ROWS.block_f)
    return (MANY_ROWS if tiles >= ENOUGH_TILES * MULTIPROCESSORS else None), None


def attention_blocks(
    n_sequences: int, S: int, n_heads: int, head_dim: int, backward: bool
) -> AttentionBlocks:
    """Return the blocks of attention: 64 rows where each multiprocessor gets a CTA then, which in
    the backward meet few columns, so that more CTAs have room; else 32 or 16, which meet more at
    once, since a CTA alone waits for each step."""
    counts = {r: n_sequences * n_heads * ctas(S, r) for r in (64, 32)}
    rows = next((r for r, count in counts.items() if count >= MULTIPROCESSORS), 16)
    wide = head_dim > 64
    warps = 8 if wide and backward and rows > 16 else 4
    columns = 128 if rows == 16 and not wide else 64
    if rows > 16 and backward:
        columns = 32
    stages = 3 if rows == 64 and not wide and (backward or head_dim == 64) else 2
    return AttentionBlocks(rows, min(columns, max(16, next_power_of_2(S))), stages, warps)
