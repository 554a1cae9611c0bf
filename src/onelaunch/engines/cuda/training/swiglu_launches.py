"""Launch the matrix products that have SwiGLU in their epilogues, on the current stream.

Shapes as in launches.py: N rows, D model width, F hidden width. All tensors are in T, bfloat16 or
float16, and contiguous; D and F are multiples of 8, and tensors begin at multiples of 16 bytes, as
TMA wants. TMA descriptors are kernel arguments, so that a launch allocates nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onelaunch.engines.cuda.training import launches, swiglu_products
from onelaunch.engines.cuda.training.forms import ProductTile


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
