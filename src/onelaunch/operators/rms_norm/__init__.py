"""RMSNorm as one operator: many rows in a program where rows are short, one launch forward, two
backward.

    from onelaunch import RMSNorm, rms_norm
    y = rms_norm(x, weight, eps=1e-6)

`plan` chooses the kernel and its shape, `kernels` holds the Triton kernels, `launch` runs them,
`autograd` ties them to PyTorch, `reference` is the plain form.
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

    x: (..., C) in float32, bfloat16 or float16, its rows at any strides; weight: (C,), of any of
    these dtypes, or None. Returns a tensor of x's shape and dtype, under autocast too.

    `casting` says where results are rounded: `llama` and `gemma` as the Hugging Face models of
    these names do, `none` in x's dtype throughout but for the float32 sum of squares and its root;
    `reference` has the table. Gradients are computed in float32 and rounded once, but for dW in
    `llama`, whose terms are rounded as autograd of Hugging Face's module rounds them. dW is the
    same from run to run, and a row's result does not depend on the other rows as long as `row_mode`
    or the rule gives them the same path.

    `in_place` lets the backward write dX over the gradient that came in: less memory, for graphs in
    which nobody else reads that gradient. Not where y is added to something, as in x + rms_norm(x):
    both branches of a sum are given one and the same gradient. Only eager calls on a device with a
    kernel heed it.
    `row_mode` forces one row a program (`row`) or several (`block`); `rule` is ours (`tuned`) or
    the published one (`source`).

    Where there is no kernel (CPU, float64, rows beyond 262,144 columns, forward-mode
    differentiation) the plain PyTorch form runs. Raises TypeError and ValueError where the
    arguments do not fit together, RuntimeError where a kernel's gradient is to be differentiated
    again.
    """
    if torch.compiler.is_compiling():
        Settings(eps, casting, offset, in_place, row_mode, rule)  # checks
        return traced(x, weight, eps, casting, offset, row_mode, rule)
    return apply(x, weight, settings(eps, casting, offset, in_place, row_mode, rule))


class RMSNorm(nn.Module):
    """`rms_norm` with its weight, in the place of `torch.nn.RMSNorm` over the last axis; of its
    roundings too with casting="gemma". `eps` is a number, never None.

    The weight starts at 1 - offset, so that the norm begins as x / rms(x). Other arguments are
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
            raise ValueError("RMSNorm: an offset is added to a weight, and there is none")
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
        """What is added to the mean of squares."""
        return self.settings.eps

    def reset_parameters(self) -> None:
        """Weight 1 - offset."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.settings.offset)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if torch.compiler.is_compiling():
            s = self.settings
            return traced(x, self.weight, s.eps, s.casting, s.offset, s.row_mode, s.rule)
        return apply(x, self.weight, self.settings)

    def extra_repr(self) -> str:
        s = self.settings
        said = f"{self.normalized_shape[0]}, eps={s.eps}, casting={s.casting!r}"
        said += f", offset={s.offset}" if s.offset else ""
        return said + ("" if self.elementwise_affine else ", elementwise_affine=False")
