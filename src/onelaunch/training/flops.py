"""Model FLOPs utilization: the floating-point operations of training, and the peaks of GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from onelaunch.config import ModelConfig

# FLOP/s of matrix products in bfloat16, dense, by the makers' data sheets. The first entry whose
# words are all in a device's name counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GB200", 2500e12),
    ("GH200", 989.5e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.5e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307.4e12),
)
# a part of a GPU, or another one with a longer name
_OTHER = {"MIG", "LAPTOP", "TI", "D", "MAX"}


@dataclass(frozen=True)
class TrainingFlops:
    """What a token costs, and what the device could do.

    per_token: operations of forward and backward for one token.
    peak: the device's FLOP/s in the dtype that is computed in; None if unknown.
    """

    per_token: int
    peak: float | None = None

    def rates(self, tokens: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return `flops_per_second`, and `mfu` (a fraction of the peak) if the peak is known.

        `seconds` are the parts of the time of `tokens`, see `clock.StepClock`; evaluation and
        checkpoints do not count.
        """
        time = seconds["wall"] - seconds["evaluation"] - seconds["checkpoint"]
        rate = self.per_token * tokens / time if time > 0 else 0.0
        return {"flops_per_second": rate} | ({"mfu": rate / self.peak} if self.peak else {})


def training_flops(
    config: ModelConfig, seq_len: int, device: torch.device, dtype: str, devices: int = 1
) -> TrainingFlops:
    """Return the cost of a model's tokens in sequences of `seq_len`, and the peak of so many
    devices."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_flops(name, dtype)
    return TrainingFlops(flops_per_token(config, seq_len), peak and devices * peak)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """6 for each weight that is multiplied, and 12 x layers x width of the queries x positions for
    attention (Chowdhery et al., arXiv 2204.02311, appendix B).

    As there and in nanoGPT attention counts as if it saw all positions. Looking up an embedding is
    no product; what is computed again is not counted.
    """
    shapes = config.weight_shapes()
    if not config.tied_embeddings:
        del shapes["embed_tokens.weight"]
    products = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    return 6 * products + 12 * config.n_layers * config.q_dim * seq_len


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its name; None if unknown, or not in bfloat16."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if dtype != "bfloat16" or words & _OTHER:
        return None
    return next((peak for name, peak in _PEAKS if set(name.upper().split()) <= words), None)


def format_rate(flops_per_second: float) -> str:
    """Format a rate, as in "412 TFLOP/s"."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if flops_per_second >= size:
            return f"{flops_per_second / size:.3g} {unit}FLOP/s"
    return f"{flops_per_second / 1e6:.3g} MFLOP/s"
