"""Llama 3's rotary scaling in GGUF files: the tensor `rope_freqs.weight`, one divisor per pair.

llama.cpp's converter computes the tensor from the parameters and leaves them out; they are
recognized by computing it again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onelaunch.config import RopeScaling

SCALING_KEY = "onelaunch.rope_scaling"
"""Prefix of the parameters as this package writes them: others than Llama 3's are not recognized
without."""
SCALING_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_TOLERANCE = 1e-5


def scaling_divisors(scaling: RopeScaling, head_dim: int, rope_theta: float) -> Tensor:
    """Return what each pair's frequency is divided by, (head_dim / 2,), as llama.cpp's converter
    computes it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope_theta**exponents
    divisors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_seq_len / wavelength
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(scaling.factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(divisors, dtype=torch.float32)


def is_scaling(divisors: Tensor, scaling: RopeScaling, rope_theta: float) -> bool:
    """Return whether a tensor has the divisors of a scaling."""
    expected = scaling_divisors(scaling, 2 * divisors.numel(), rope_theta)
    return torch.allclose(divisors.float(), expected, rtol=_TOLERANCE, atol=0)


def recognize_scaling(divisors: Tensor, rope_theta: float) -> RopeScaling | None:
    """Return the parameters of Llama 3 (the published low and high factors and context, and the
    factor that the largest divisor is) whose divisors these are; None if there are none."""
    largest = float(divisors.max())
    if not 1 <= largest < math.inf:
        return None
    scaling = RopeScaling(factor=float(str(divisors.max().numpy())))
    return scaling if is_scaling(divisors, scaling, rope_theta) else None
