"""Validation loss: mean cross-entropy over given batches, every target counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from onelaunch.engines.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token over `tokens` predicted tokens; `whole` unless it was cut short."""

    loss: float
    tokens: int
    whole: bool = True


def evaluate(
    engine: Engine,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Mean loss over batches of (tokens_BS, targets_BS). `stop` is asked before each batch."""
    total, count = 0.0, 0
    for tokens_BS, targets_BS in batches:
        if stop():
            return Evaluation(float("nan"), count, whole=False)
        logits_BSV = engine.logits(torch.from_numpy(tokens_BS))
        targets = torch.from_numpy(targets_BS).to(logits_BSV.device)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets.flatten(), reduction="sum")
        total += loss.item()
        count += targets.numel()
        progress(count)
    return Evaluation(total / max(1, count), count)
