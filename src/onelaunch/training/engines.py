"""The engine that a recipe trains with."""

from __future__ import annotations

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines import cpu
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.training.recipe import Recipe
from onelaunch.training.sections import TRAIN_WITH


def engine_name(recipe: Recipe) -> str:
    """reference, cpu or coreml: what `train.engine` means here. Raises BadInput for a device that
    does not exist."""
    train = recipe.train
    if train.engine != "auto":
        return train.engine
    compiled = resolve_device(train.device).type == "cpu" and cpu.why_not() is None
    fits = all(getattr(train, name) in allowed for name, allowed in TRAIN_WITH.items())
    return "cpu" if compiled and fits else "reference"


def make_engine(recipe: Recipe, config: ModelConfig, weights: dict[str, Tensor]) -> ReferenceEngine:
    """The engine, with weights of its own."""
    train, programs = recipe.train, recipe.coreml
    name = engine_name(recipe)
    if name == "coreml":
        from onelaunch.compilation.cache import Store
        from onelaunch.engines.coreml.training import CoreMLTrainer

        return CoreMLTrainer(
            config,
            weights,
            programs.fusion_depth,
            programs.taps,
            programs.staleness,
            programs.dtype,
            programs.compile_budget,
            Store(),
        )
    if name == "cpu":
        from onelaunch.engines.cpu.training.engine import CpuTrainer

        return CpuTrainer(config, weights)
    return ReferenceEngine(
        config,
        weights,
        device=train.device,
        dtype=None if train.dtype == "auto" else train.dtype,
        dropout=train.dropout,
        compile=train.compile,
        train=True,
        norm=train.norm,
    )
