"""Training driven update by update, for the experiments that time it: through ML Programs, with
PyTorch, or on the engine that `onelaunch train` uses on the device."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from onelaunch.bench.core.record import Log
from onelaunch.bench.core.timing import synchronizer
from onelaunch.bench.core.weights import SEED, random_weights
from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.training import CoreMLTrainer
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import MissingExtra
from onelaunch.training.clock import StepClock
from onelaunch.training.data import open_data
from onelaunch.training.engines import engine_name, make_engine
from onelaunch.training.optim import clip_and_step, make_optimizer
from onelaunch.training.pending import to_device
from onelaunch.training.recipe import Recipe

Engine = TypeVar("Engine", bound=ReferenceEngine)
PYTORCH_NAME = "PyTorch"
ENGINE_NAMES = {"cpu": "CPU engine", "cuda": "CUDA engine"}
"""What cases call our engines that train, by their names in a recipe."""
OPTIMIZER = "optimizer"
WARM_UPDATES, WARM_MICRO_STEPS = 3, 3
"""After which an engine has compiled and captured everything: a CUDA engine launches each kind of
micro-step, the first of an update and the others, once, and captures its second use; likewise the
optimizer step."""


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
    """Updates of a trainer on the built-in stories, one sequence of `sequence` tokens at a time, as
    the training loop makes them: on a GPU no copy and no update is waited for, and gradients are
    clipped."""

    def __init__(self, engine: Engine, sequence: int) -> None:
        self.engine = engine
        self.sequence = sequence
        recipe = Recipe()
        self._parameters = engine.parameters()
        self.optimizer = make_optimizer(self._parameters, recipe, engine.flat)
        self._rate, self._clip = recipe.optimizer.lr, recipe.optimizer.grad_clip
        self._sampler = open_data("stories", SEED).train(sequence, SEED)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next micro-step's tokens and targets, on the device."""
        tokens, targets = to_device(self.engine.device, *self._sampler.next(1))
        return tokens, targets

    def micro_step(self, scale: float) -> None:
        """Forward and backward of the next sequence."""
        self.engine.train_step(*self.next_batch(), scale)

    def step(self) -> None:
        """Clip the gradients, update the parameters, and remove the gradients."""
        clip_and_step(self.optimizer, self._parameters.values(), self._rate, self._clip)

    def update(self, k: int, renew: bool = True) -> Update:
        """One of k micro-steps. Without `renew` the programs are kept, as if weights that change
        needed no new ones: what is computed is then of old weights, and takes as long."""
        return self.updates(k, 1, renew)[0]

    def updates(self, k: int, count: int, renew: bool = True) -> list[Update]:
        """Some of k micro-steps each, one after another; see `update`. On a GPU their seconds are
        between events, and the host waits for the last one only."""
        self.engine.telemetry()
        self.wait()
        clock = StepClock(self.engine.device)
        issued = []
        for _ in range(count):
            for _ in range(k):
                self.micro_step(1 / k)
            clock.skip()
            self.step()
            if renew:
                self.engine.after_update()
            clock.mark(OPTIMIZER)
            stall = self.engine.telemetry().get("stall_seconds", 0.0)
            issued.append((clock.end_later(), stall))
            clock.begin()
        timed = [(read(), stall) for read, stall in issued]
        return [Update(k, of["wall"], stall, of[OPTIMIZER]) for of, stall in timed]

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


def own_engine(name: str, device: str) -> str | None:
    """The engine of ours, `cpu` or `cuda`, that `train.engine = "auto"` takes for a preset on a
    device; None where it takes PyTorch."""
    engine = engine_name(_recipe(device), preset(name))
    return engine if engine in ENGINE_NAMES else None


def log_without_engine(device: str, log: Log) -> None:
    """Tell the user why rows are missing where `own_engine` is None."""
    log(f"without an engine of ours: on {device} train.engine = 'auto' takes PyTorch")


@contextmanager
def engine_driver(
    name: str, sequence: int, device: str, warm: bool = True
) -> Iterator[Driver[ReferenceEngine]]:
    """Training on the engine that `train.engine = "auto"` takes on a device, of a preset with
    random weights; `warm`: after the updates in which it compiles and captures."""
    config = preset(name)
    engine = make_engine(_recipe(device), config, random_weights(config))
    try:
        training = Driver(engine, sequence)
        if warm:
            training.updates(WARM_MICRO_STEPS, WARM_UPDATES)
        yield training
    finally:
        engine.close()


@contextmanager
def pytorch_and_engine(
    name: str, sequence: int, device: str, log: Log
) -> Iterator[dict[str, Driver[ReferenceEngine]]]:
    """Training with PyTorch and on our engine for the device, where there is one, by the names that
    cases have."""
    with ExitStack() as stack:
        trainings = {PYTORCH_NAME: pytorch_driver(name, sequence, device)}
        if engine := own_engine(name, device):
            ours = stack.enter_context(engine_driver(name, sequence, device))
            trainings[ENGINE_NAMES[engine]] = ours
        else:
            log_without_engine(device, log)
        yield trainings


def _recipe(device: str) -> Recipe:
    return Recipe().with_settings({"train.device": device}, "bench")


def why_no_programs(device: str) -> str | None:
    """Why training through ML Programs is not timed here; None where it is."""
    if torch.device(device).type != "cpu":
        return f"--device {device}: ML Programs are made and evaluated on the CPU"
    try:
        coremltools("bench")
    except MissingExtra as error:
        return str(error)
    return None
