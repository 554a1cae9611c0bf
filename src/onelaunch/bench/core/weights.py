"""Random weights of the experiments: the same for the same configuration and seed."""

from __future__ import annotations

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.model import Model

SEED = 1


def random_weights(config: ModelConfig, seed: int = SEED) -> dict[str, Tensor]:
    """As checkpoints name them, float32."""
    return {n: p.detach() for n, p in Model(config).init_weights(seed).named_parameters()}
