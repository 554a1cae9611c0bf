"""Norms for the benchmark's tests: right, wrong, and in place."""

import torch
from torch import Tensor

from onelaunch.operators.rms_norm.reference import rms_norm as plain

EPS = 1e-6


def right(x: Tensor, weight: Tensor) -> Tensor:
    return plain(x, weight, EPS, "gemma")


def without_weight(x: Tensor, weight: Tensor) -> Tensor:
    return plain(x, None, EPS) + 0 * weight


def last_row_missing(x: Tensor, weight: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], 1, dtype=x.dtype, device=x.device)
    mask[-1] = 0
    return right(x, weight) * mask


class InPlace(torch.autograd.Function):
    """As Liger does: dX is written over the incoming gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return right(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            dx, dw = torch.autograd.grad(right(x, weight), (x, weight), dy)
        return dy.copy_(dx), dw


class FakeGraph:
    """What a captured graph does, without a device: replaying writes the same outputs anew."""

    def __init__(self, call, sets, calls, kept):
        self.call, self.sets, self.calls, self.kept = call, sets, calls, kept

    def replay(self):
        for i in range(self.calls):
            made = self.call(i % self.sets)
            with torch.no_grad():
                for old, new in zip(self.kept[i % self.sets], made, strict=True):
                    if old is not new:
                        old.copy_(new)
