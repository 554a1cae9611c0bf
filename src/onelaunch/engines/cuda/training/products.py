"""What a training step leaves to libraries: matrix products and attention, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onelaunch.engines.cuda.training.kinds import ATTENTION, PRODUCT, WEIGHT_GRADIENT, launched

_FASTEST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip
_IN_TWO_BLOCKS, _WIDTH = 256, 64
"""FlashAttention's backward adds what blocks of 128 keys give to the gradient of queries in any
order; two terms have the same sum in both. Heads are this wide at most."""


def multiply(x_NK: Tensor, weight_RK: Tensor, out_NR: Tensor) -> None:
    """out = x weight'."""
    torch.mm(x_NK, weight_RK.t(), out=out_NR)
    launched(PRODUCT)


def multiply_back(dy_NR: Tensor, weight_RK: Tensor, out_NK: Tensor) -> None:
    """out = dy weight: the gradient of what the weight was multiplied with."""
    torch.mm(dy_NR, weight_RK, out=out_NK)
    launched(PRODUCT)


def weight_gradient(dy_NR: Tensor, x_NK: Tensor, gradient_RK: Tensor, accumulate: bool) -> None:
    """gradient = dy' x, in float32, or its sum with what is there."""
    if dy_NR.dtype == torch.float32:
        if accumulate:
            gradient_RK.addmm_(dy_NR.t(), x_NK)
        else:
            torch.mm(dy_NR.t(), x_NK, out=gradient_RK)
    elif dy_NR.device.type == "cpu":  # as the GPU has it: float32 sums, which are not rounded
        product = dy_NR.float().t() @ x_NK.float()
        gradient_RK.copy_(gradient_RK + product if accumulate else product)
    elif accumulate:
        torch.addmm(gradient_RK, dy_NR.t(), x_NK, out_dtype=torch.float32, out=gradient_RK)
    else:
        torch.mm(dy_NR.t(), x_NK, out_dtype=torch.float32, out=gradient_RK)
    launched(WEIGHT_GRADIENT)


class Attention:
    """Causal attention of grouped queries by what PyTorch has that is fastest; autograd keeps what
    its backward needs, which may be called again. Both have the same bits from run to run."""

    def __init__(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> None:
        _, length, heads, width = q_BSHE.shape
        self._any_order = length <= _IN_TWO_BLOCKS and width <= _WIDTH
        backends = [SDPBackend.FLASH_ATTENTION, *_FASTEST] if self._any_order else _FASTEST
        if q_BSHE.dtype == torch.float32:
            backends = [SDPBackend.MATH]
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q_BSHE, k_BSKE, v_BSKE))
        self._inputs = q, k, v
        with torch.enable_grad(), sdpa_kernel(backends, set_priority=True):
            self._out_BHSE = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=heads != k_BSKE.shape[2]
            )
        launched(ATTENTION)

    @property
    def out_NQ(self) -> Tensor:
        """Rows of all heads."""
        B, H, S, E = self._out_BHSE.shape
        return self._out_BHSE.detach().transpose(1, 2).reshape(B * S, H * E)

    def backward(self, dout_BSHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values, (N, heads, E) each."""
        with nullcontext() if self._any_order else _deterministic():
            dq, dk, dv = torch.autograd.grad(
                self._out_BHSE, self._inputs, dout_BSHE.transpose(1, 2), retain_graph=True
            )
        dq, dk, dv = (d.transpose(1, 2).flatten(0, 1) for d in (dq, dk, dv))
        launched(ATTENTION)
        return dq, dk, dv


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order, where there is a choice."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        filling.fill_uninitialized_memory = fills
