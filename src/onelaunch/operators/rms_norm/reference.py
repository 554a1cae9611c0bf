"""RMSNorm in plain PyTorch: the reference for the kernels, and the fallback without a kernel.

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)        (Zhang and Sennrich, 1910.07467)

The castings differ in where they round to the input's dtype:

| casting | statistics | x / rms | times weight |
|---|---|---|---|
| llama | float32 | rounded | in the wider dtype of x and weight, then rounded |
| gemma | float32 | float32 | float32, rounded once |
| none | float32 | rounded | weight + offset rounded to the input's dtype, product rounded |

`llama` and `gemma` compute what the Hugging Face models of these names compute, and dW is what
autograd computes for those models: in `llama` dW is the float32 sum of dY times the rounded
x / rms, each product rounded to the promoted dtype of x and weight; in `gemma` nothing is rounded
before the sum. `none` works in the input's dtype, except for the sum of squares and the reciprocal
root, which stay in float32: a sum of squares in bfloat16 loses most of its bits, in float16 it
overflows. So in half precision `none` differs from a module that works in the input's dtype
throughout (Liger-Kernel's tests compare with one, and expect failures); its dW, which rounds
nothing before the sum, is more exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

CASTINGS = ("llama", "gemma", "none")


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    casting: str = "llama",
    offset: float = 0.0,
) -> Tensor:
    """RMSNorm over the last axis; x (..., C), weight (C,) or None. The result has x's dtype.

    Without a weight `offset` is ignored. Float64 inputs are computed in float64 throughout.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting != "gemma":
        normed = normed.to(x.dtype)
    if weight is None:
        return normed.to(x.dtype)
    scale = _scale(weight, x.dtype, casting, offset, wide)
    return (normed * scale).to(x.dtype)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    casting: str = "llama",
    offset: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """(dX, dW) in closed form, computed in float32 and rounded once (float64 for float64 inputs):

    m = dy * scale,  n = x * rstd,  dx = rstd * (m - n * mean(m * n)),  dw = sum of dy * n

    In `llama` n and dy * n are rounded before the sum in dw.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide, dy_wide = x.to(wide), dy.to(wide)
    rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    n = x_wide * rstd
    m = dy_wide
    if weight is not None:
        m = dy_wide * _scale(weight, x.dtype, casting, offset, wide)
    dx = rstd * (m - n * (m * n).mean(-1, keepdim=True))
    if weight is None:
        return dx.to(x.dtype), None
    terms = dy_wide * n
    if casting == "llama":
        promoted = torch.promote_types(x.dtype, weight.dtype)
        terms = (dy.to(promoted) * n.to(x.dtype)).to(wide)
    return dx.to(x.dtype), terms.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _scale(
    weight: Tensor, dtype: torch.dtype, casting: str, offset: float, wide: torch.dtype
) -> Tensor:
    """weight + offset, rounded according to the casting."""
    if casting == "gemma":
        return weight.to(wide) + offset
    if casting == "none":
        return weight.to(dtype) + offset
    return weight + offset if offset else weight
