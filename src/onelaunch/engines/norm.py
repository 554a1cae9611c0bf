"""Which RMSNorm an engine's model uses: PyTorch's or this package's operator."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from onelaunch import model
from onelaunch.errors import BadInput

NORMS = ("auto", "torch", "onelaunch")


def choose_norm(requested: str, has_kernel: bool, compiled: bool) -> str:
    """The norm used, "torch" or "onelaunch": the one requested, or for "auto" the operator where
    the device has its kernel, unless torch.compile is used, which fuses PyTorch's form with its
    neighbours and is then 5 to 22% ahead (benchmarks/records/nvidia-h200/rms-norm-training.json).
    Raises BadInput for a name not in `NORMS`."""
    if requested not in NORMS:
        raise BadInput(f"norm={requested!r}: must be one of {', '.join(NORMS)}")
    if requested != "auto":
        return requested
    return "onelaunch" if has_kernel and not compiled else "torch"


def has_norm_kernel(device: torch.device) -> bool:
    """Whether the operator runs its own kernel on this GPU, rather than its plain form.

    Never on a CPU: Triton's interpreter is for tests.
    """
    if device.type != "cuda":
        return False
    from onelaunch.operators.rms_norm import launch

    return launch.available(device)


@cache
def norm_function(name: str) -> model.Norm:
    """The function behind "torch" or "onelaunch".

    Both compute in float32 and round once, to the input's dtype; under CUDA's autocast PyTorch's
    may return float32 for a narrower input.
    """
    if name == "torch":
        return model.rms_norm
    from onelaunch.operators.rms_norm import rms_norm

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps, casting="gemma")

    return norm
