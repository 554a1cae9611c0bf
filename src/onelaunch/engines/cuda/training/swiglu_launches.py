"""Launch the matrix products that have SwiGLU in their epilogues, on the current stream.

Shapes as in launches.py: N rows, D model width, F hidden width. All tensors are in T, bfloat16 or
float16, and contiguous; D and F are multiples of 8, and tensors begin at multiples of 16 bytes, as
TMA wants. TMA descriptors are kernel arguments, so that a launch allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onelaunch.engines.cuda.training import launches, swiglu_products
from onelaunch.engines.cuda.training.launches import MULTIPROCESSORS, ctas


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


class SwigluTiles(NamedTuple):
    """Those of the products with SwiGLU of a feed-forward; None for a library's product and a
    SwiGLU of its own."""

    forward: ProductTile | None
    backward: ProductTile | None


def swiglu_tiles(N: int, D: int, F: int) -> SwigluTiles:
    """Return the form that measured fastest on an H200: of little work both fused, of much the
    forward alone. With many rows the backward's epilogue costs more than it saves."""
    if 4 * N * D * F <= LITTLE_WORK:
        return SwigluTiles(FEW_ROWS, FEW_ROWS_BACK)
    tiles = ctas(N, MANY_ROWS.block_m) * ctas(F, MANY_ROWS.block_f)
    enough = tiles >= ENOUGH_TILES * MULTIPROCESSORS
    return SwigluTiles(MANY_ROWS if enough else None, None)


def can_fuse(weights: Tensor, D: int, F: int) -> bool:
    """Whether TMA can read such weights and what meets them, on their device."""
    if weights.dtype not in (torch.bfloat16, torch.float16) or D % 8 or F % 8:
        return False
    return weights.is_cuda and torch.cuda.get_device_capability(weights.device) >= (9, 0)


def gate_up_swiglu(
    normed_ND: Tensor, weight_2FD: Tensor, gate_up_N2F: Tensor, hidden_NF: Tensor, tile: ProductTile
) -> None:
    """Write gate_up = normed weight', a row's F gates first, and hidden = silu(gate) * up."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (N, D), F, block = normed_ND.shape, hidden_NF.shape[1], tile.block_f
    x = TensorDescriptor.from_tensor(normed_ND, [tile.block_m, tile.block_k])
    weight = TensorDescriptor.from_tensor(weight_2FD.view(2, F, D), [2, block, tile.block_k])
    outputs: tuple[object, object] = gate_up_N2F, hidden_NF
    if tile.tma_stores:
        width = block // tile.parts
        outputs = (
            TensorDescriptor.from_tensor(gate_up_N2F.view(N, 2, F), [tile.block_m, 1, width]),
            TensorDescriptor.from_tensor(hidden_NF, [tile.block_m, width]),
        )
    launches.launch(
        swiglu_products.gate_up_swiglu_kernel, tile.grid(N, F), x, weight, *outputs, N,
        F=F, D=D, TMA_STORES=tile.tma_stores, **tile.options(),
    )  # fmt: skip


def down_back_swiglu(
    dx_ND: Tensor,
    weight_DF: Tensor,
    gate_up_N2F: Tensor,
    dgate_up_N2F: Tensor,
    hidden_NF: Tensor | None,
    tile: ProductTile,
) -> None:
    """Write the gradient of gates and ups, which may take their place, from dhidden = dx weight;
    and hidden again unless it is None."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (N, D), F = dx_ND.shape, weight_DF.shape[1]
    dx = TensorDescriptor.from_tensor(dx_ND, [tile.block_m, tile.block_k])
    weight = TensorDescriptor.from_tensor(weight_DF, [tile.block_k, tile.block_f])
    launches.launch(
        swiglu_products.down_back_swiglu_kernel, tile.grid(N, F),
        dx, weight, gate_up_N2F, dgate_up_N2F, hidden_NF, N,
        F=F, D=D, AHEAD=tile.ahead, **tile.options(),
    )  # fmt: skip
