"""Launch the matrix products that have SwiGLU in their epilogues, on the current stream.

Shapes as in launches.py: N rows, D model width, F hidden width. All tensors are in T, bfloat16 or
float16, and contiguous; D and F are multiples of 8, and tensors begin at multiples of 16 bytes, as
TMA wants. TMA descriptors are kernel arguments, so that a launch allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

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


FORWARD_CANDIDATES = (
    ProductTile(128, 128, 64, 3, 8, 1, flatten=True, tma_stores=True),
    ProductTile(128, 128, 64, 3, 8, 1, tma_stores=True),
    ProductTile(128, 128, 64, 4, 8, 1, parts=2, flatten=True),
    ProductTile(128, 64, 64, 2, 8, 2, flatten=True, tma_stores=True),
    ProductTile(128, 64, 64, 2, 8, 0, tma_stores=True),
    ProductTile(128, 64, 32, 4, 8, 2, flatten=True, tma_stores=True),
    ProductTile(128, 64, 64, 3, 8, 0),
    ProductTile(64, 64, 64, 3, 4, 0),
)
"""Not measured yet. Those of 128 x 128 read the least from the L2; those of 64 columns leave room
for two CTAs on a multiprocessor, one of which multiplies while the other one writes."""

FORWARD_CANDIDATES_OF_FEW_ROWS = (
    ProductTile(64, 32, 64, 5, 4, 0, tma_stores=True),
    ProductTile(64, 32, 128, 3, 4, 0, tma_stores=True),
    ProductTile(64, 64, 64, 4, 4, 0, tma_stores=True),
    ProductTile(64, 32, 64, 5, 4, 0),
)

BACKWARD_CANDIDATES = (
    ProductTile(128, 128, 64, 3, 8, 0, parts=4),
    ProductTile(128, 128, 64, 3, 8, 2, parts=4, flatten=True),
    ProductTile(128, 128, 64, 3, 8, 0, parts=4, ahead=1, max_registers=128),
    ProductTile(128, 128, 64, 4, 8, 1, parts=4, ahead=2),
    ProductTile(128, 256, 64, 3, 8, 1, parts=4, flatten=True),
    ProductTile(128, 64, 64, 3, 8, 0, parts=2, ahead=1),
    ProductTile(64, 128, 64, 2, 4, 0, parts=4),
    ProductTile(64, 128, 64, 3, 4, 0, parts=4, ahead=1),
)

BACKWARD_CANDIDATES_OF_FEW_ROWS = (
    ProductTile(64, 32, 64, 5, 4, 0, ahead=1),
    ProductTile(64, 32, 128, 3, 4, 0, ahead=2),
    ProductTile(64, 64, 64, 4, 4, 0, parts=2, ahead=1),
)


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
