"""What a training step leaves to libraries: matrix products and attention, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's took 0.55 to 0.95 of the time of FlashAttention 2 on an H200, at head widths 48 to 128
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip


def multiply(x_NK: Tensor, weight_RK: Tensor, out_NR: Tensor) -> None:
    """out = x weight'."""
    torch.mm(x_NK, weight_RK.t(), out=out_NR)


def multiply_back(dy_NR: Tensor, weight_RK: Tensor, out_NK: Tensor) -> None:
    """out = dy weight: the gradient of what the weight was multiplied with."""
    torch.mm(dy_NR, weight_RK, out=out_NK)


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


class Attention:
    """Causal attention of grouped queries by what PyTorch has that is fastest; autograd keeps what
    its backward needs, which may be called again. Both have the same bits from run to run."""

    def __init__(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> None:
        backends = [SDPBackend.MATH] if q_BSHE.dtype == torch.float32 else _BACKENDS
        with torch.enable_grad(), sdpa_kernel(backends, set_priority=True), _deterministic():
            self._inputs = tuple(
                x.detach().transpose(1, 2).requires_grad_() for x in (q_BSHE, k_BSKE, v_BSKE)
            )
            grouped = q_BSHE.shape[2] != k_BSKE.shape[2]
            self._out_BHSE = F.scaled_dot_product_attention(
                *self._inputs, is_causal=True, enable_gqa=grouped
            )

    @property
    def out_NQ(self) -> Tensor:
        """Rows of all heads."""
        B, H, S, E = self._out_BHSE.shape
        return self._out_BHSE.detach().transpose(1, 2).reshape(B * S, H * E)

    def backward(self, dout_BSHE: Tensor) -> tuple[Tensor, ...]:
        """The gradients of queries, keys and values, (N, heads, E) each."""
        with _deterministic():
            gradients = torch.autograd.grad(
                self._out_BHSE, self._inputs, dout_BSHE.transpose(1, 2), retain_graph=True
            )
        return tuple(d.transpose(1, 2).flatten(0, 1) for d in gradients)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order, where there is a choice."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
