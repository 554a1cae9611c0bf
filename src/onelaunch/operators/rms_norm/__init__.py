"""RMSNorm as one differentiable operator: short rows share a CTA; one launch forward, two
backward.

    from onelaunch import RMSNorm, rms_norm
    y = rms_norm(x, weight, eps=1e-6)

`plan` chooses kernel and tile, `kernels` has the Triton kernels, `launch` runs them, `autograd`
registers them with PyTorch, `reference` is the plain PyTorch form.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor, nn

from onelaunch.operators.rms_norm.autograd import apply, traced
from onelaunch.operators.rms_norm.launch import Settings, settings

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    casting: str = "llama",
    offset: float = 0.0,
    in_place: bool = False,
    row_mode: str = "auto",
    rule: str = "tuned",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis (1910.07467).

    x: (..., C) in float32, bfloat16 or float16, rows at any strides; weight: (C,), in any of these
    dtypes, or None. Returns a tensor of x's shape and dtype, under autocast too.

    casting: where results are rounded. `llama` and `gemma` round as the Hugging Face models of
        these names, `none` in x's dtype throughout, except the float32 sum of squares and its root;
        `reference` has the table. Gradients are computed in float32 and rounded once, except dW in
        `llama`, whose terms are rounded as autograd of Hugging Face's module rounds them. dW is the
        same in every run; the result of a row does not depend on other rows if `row_mode` or the
        rule selects the same kernel for both.
    in_place: the backward writes dX over the incoming gradient, to save memory. Only valid if
        nothing else reads that gradient: not in x + rms_norm(x), where both branches of the sum
        share one gradient. Has an effect in eager calls with a kernel only.
    row_mode: `row` forces one row per CTA, `block` several.
    rule: how the kernel is chosen: `tuned` (ours) or `source` (the published rule).

    Without a kernel (CPU, float64, rows of more than 262,144 columns, forward-mode differentiation)
    the plain PyTorch form runs. Raises TypeError and ValueError for invalid arguments, RuntimeError
    for a second derivative through a kernel.
    """
    if torch.compiler.is_compiling():
        Settings(eps, casting, offset, in_place, row_mode, rule)  # checks
        return traced(x, weight, eps, casting, offset, row_mode, rule)
    return apply(x, weight, settings(eps, casting, offset, in_place, row_mode, rule))


class RMSNorm(nn.Module):
    """A drop-in for `torch.nn.RMSNorm` over the last axis, with `rms_norm` as its forward; with
    casting="gemma" it also rounds like it. `eps` is a number, never None.

    The weight starts at 1 - offset, so that the norm starts as x / rms(x). The other arguments are
    those of `rms_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        casting: str = "llama",
        offset: float = 0.0,
        in_place: bool = False,
        row_mode: str = "auto",
        rule: str = "tuned",
    ) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        self.normalized_shape = tuple(map(index, shape))
        if len(self.normalized_shape) != 1:
            raise ValueError(f"RMSNorm normalizes the last axis, not {self.normalized_shape}")
        if offset and not elementwise_affine:
            raise ValueError(
                "RMSNorm: offset needs a weight; set elementwise_affine=True or offset=0"
            )
        self.elementwise_affine = elementwise_affine
        self.settings = settings(eps, casting, offset, in_place, row_mode, rule)
        if elementwise_affine:
            self.weight = nn.Parameter(
                torch.empty(self.normalized_shape, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    @property
    def eps(self) -> float:
        """The number added to the mean of squares."""
        return self.settings.eps

    def reset_parameters(self) -> None:
        """Set the weight to 1 - offset."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.settings.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C) over its last axis."""
        if torch.compiler.is_compiling():
            s = self.settings
            return traced(x, self.weight, s.eps, s.casting, s.offset, s.row_mode, s.rule)
        return apply(x, self.weight, self.settings)

    def extra_repr(self) -> str:
        s = self.settings
        text = f"{self.normalized_shape[0]}, eps={s.eps}, casting={s.casting!r}"
        text += f", offset={s.offset}" if s.offset else ""
        return text + ("" if self.elementwise_affine else ", elementwise_affine=False")
