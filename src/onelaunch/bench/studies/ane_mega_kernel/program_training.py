"""Training driven update by update, through ML Programs or PyTorch, for the experiments that time
it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from onelaunch.bench.core.timing import synchronizer
from onelaunch.bench.core.weights import SEED, random_weights
from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.training import CoreMLTrainer
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import MissingExtra
from onelaunch.training.data import open_data
from onelaunch.training.optim import make_optimizer
from onelaunch.training.recipe import Recipe

Engine = TypeVar("Engine", bound=ReferenceEngine)


@dataclass(frozen=True)
class Update:
    """Seconds of one update: all of it, waiting for programs, and its optimizer step."""

    micro_steps: int
    seconds: float
    stall_seconds: float
    optimizer_seconds: float


def rate(updates: Sequence[Update]) -> float:
    """Micro-steps a second of some updates, one after another."""
    return sum(u.micro_steps for u in updates) / sum(u.seconds for u in updates)


def median_share(updates: Iterable[Update]) -> float:
    """The share of an update that it waits for programs, in the median."""
    return statistics.median(u.stall_seconds / u.seconds for u in updates)


class Driver(Generic[Engine]):
    """Updates of a trainer on the built-in stories, one sequence of `sequence` tokens at a time."""

    def __init__(self, engine: Engine, sequence: int) -> None:
        self.engine = engine
        self.sequence = sequence
        self.optimizer = make_optimizer(engine.parameters(), Recipe())
        self._sampler = open_data("stories", SEED).train(sequence, SEED)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next micro-step's tokens and targets."""
        tokens, targets = self._sampler.next(1)
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def micro_step(self, scale: float) -> None:
        """Forward and backward of the next sequence."""
        self.engine.train_step(*self.next_batch(), scale)

    def update(self, k: int, renew: bool = True) -> Update:
        """One of k micro-steps. Without `renew` the programs are kept, as if weights that change
        needed no new ones: what is computed is then of old weights, and takes as long."""
        self.engine.telemetry()
        start = time.perf_counter()
        for _ in range(k):
            self.micro_step(1 / k)
        self.wait()
        stepping = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if renew:
            self.engine.after_update()
        self.wait()
        end = time.perf_counter()
        stall = self.engine.telemetry().get("stall_seconds", 0.0)
        return Update(k, end - start, stall, end - stepping)

    def wait(self) -> None:
        """Wait for the device; nothing on a CPU."""
        synchronizer(self.engine.device)()


@contextmanager
def driver(
    name: str, sequence: int, store: Store | None = None, **options: Any
) -> Iterator[Driver[CoreMLTrainer]]:
    """Through ML Programs, of a preset with random weights."""
    config = preset(name)
    engine = CoreMLTrainer(config, random_weights(config), store=store, **options)
    try:
        yield Driver(engine, sequence)
    finally:
        engine.close()


def pytorch_driver(name: str, sequence: int, device: str) -> Driver[ReferenceEngine]:
    """Training with PyTorch on a device, as the trainer does it, of a preset with random
    weights."""
    config = preset(name)
    engine = ReferenceEngine(config, random_weights(config), device, train=True, norm="auto")
    return Driver(engine, sequence)


def why_no_programs(device: str) -> str | None:
    """Why training through ML Programs is not timed here; None where it is."""
    if torch.device(device).type != "cpu":
        return f"--device {device}: ML Programs are made and evaluated on the CPU"
    try:
        coremltools("bench")
    except MissingExtra as error:
        return str(error)
    return None
