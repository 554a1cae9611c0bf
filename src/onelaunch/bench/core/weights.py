"""Random weights of the experiments, the same for the same configuration and seed, and what they
give in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.model import Model

SEED = 1


def random_weights(config: ModelConfig, seed: int = SEED) -> dict[str, Tensor]:
    """Random float32 weights, named as in checkpoints."""
    return {n: p.detach() for n, p in Model(config).init_weights(seed).named_parameters()}


def exact_logits(config: ModelConfig, weights: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """The logits of every position, (B, S, V), in float64."""
    model = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    with torch.no_grad():
        return F.linear(model.hidden(tokens_BS), model.head_weight())
