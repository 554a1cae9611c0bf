"""Training through ML Programs, driven update by update, for the experiments that time it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.coreml.training import CoreMLTrainer
from onelaunch.model import Model
from onelaunch.training.data import open_data
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import make_optimizer

SEED = 1


@dataclass(frozen=True)
class Update:
    """Seconds of one update: all of it, waiting for programs, and its optimizer step."""

    micro_steps: int
    seconds: float
    stall_seconds: float
    optimizer_seconds: float


class Driver:
    """Updates of a trainer on the built-in stories, one text of `sequence` tokens at a time."""

    def __init__(self, engine: CoreMLTrainer, config: ModelConfig, sequence: int) -> None:
        self.engine = engine
        self._optimizer = make_optimizer(engine.parameters(), Recipe())
        self._sampler = open_data("stories", SEED).train(sequence, SEED)

    def update(self, k: int) -> Update:
        """One of k micro-steps."""
        self.engine.telemetry()
        start = time.perf_counter()
        for _ in range(k):
            tokens, targets = self._sampler.next(1)
            self.engine.loss_and_gradients(
                torch.from_numpy(tokens), torch.from_numpy(targets), 1 / k
            )
        stepping = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.engine.updated()
        end = time.perf_counter()
        told = self.engine.telemetry()
        return Update(k, end - start, told["stall_seconds"], end - stepping)


@contextmanager
def driver(
    name: str, sequence: int, store: Store | None = None, **options: Any
) -> Iterator[Driver]:
    """Of a preset with random weights."""
    config = preset(name)
    weights = {n: p.detach() for n, p in Model(config).init_weights(SEED).named_parameters()}
    engine = CoreMLTrainer(config, weights, store=store, **options)
    try:
        yield Driver(engine, config, sequence)
    finally:
        engine.close()


def told_by(say: Callable[[str], None], case: str, updates: list[Update]) -> None:
    """A line of what some updates took."""
    seconds = sum(u.seconds for u in updates)
    stall = sum(u.stall_seconds for u in updates)
    say(
        f"{case}: {len(updates)} updates of {updates[0].micro_steps} micro-steps in "
        f"{seconds:.1f} s, {stall:.2f} s of it waiting"
    )
