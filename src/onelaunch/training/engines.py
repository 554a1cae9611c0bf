"""The engine that a recipe trains with."""

from __future__ import annotations

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines import cpu, cuda
from onelaunch.engines.checks import not_computed
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput
from onelaunch.plan.training import RECOMPUTE
from onelaunch.training.recipe import Recipe
from onelaunch.training.sections import TRAIN_WITH


def engine_name(recipe: Recipe, config: ModelConfig) -> str:
    """reference, cpu, cuda or coreml: what `train.engine` means here. Raises BadInput for a device
    that does not exist."""
    train = recipe.train
    if train.engine != "auto":
        return train.engine
    device = resolve_device(train.device)
    can = {
        "cpu": cpu.why_not() is None and not_computed(config) is None,
        "cuda": cuda.why_not_train(device, config) is None,
    }
    name = device.type
    fits = all(getattr(train, key) in allowed for key, allowed in TRAIN_WITH.get(name, {}).items())
    if name == "cuda" and train.dtype == "float32":  # there it is for checking
        fits = False
    if can.get(name) and fits:
        return name
    if train.recompute != "auto":
        raise BadInput(
            f"train.recompute = {train.recompute!r}: only train.engine cuda computes again, and "
            "PyTorch would train here; leave it out"
        )
    return "reference"


def make_engine(recipe: Recipe, config: ModelConfig, weights: dict[str, Tensor]) -> ReferenceEngine:
    """The engine, with weights of its own."""
    train, programs = recipe.train, recipe.coreml
    name = engine_name(recipe, config)
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
    if name == "cuda":
        if reason := cuda.why_not_train(resolve_device(train.device), config):
            raise BadInput(f"train.engine = 'cuda': {reason}; use 'reference', or 'auto'")
        from onelaunch.engines.cuda.training.engine import CudaTrainer  # imports Triton

        dtype = None if train.dtype == "auto" else train.dtype
        recompute = next((each for each in RECOMPUTE if each == train.recompute), None)
        return CudaTrainer(config, weights, train.device, dtype, train.dropout, recompute)
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
