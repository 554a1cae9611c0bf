"""A run's whole state, to a checkpoint and back: what makes a resume exact."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onelaunch.checkpoints.run_folder import MODEL_FILE, read_tensors, write_checkpoint
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from onelaunch.training.loop import Progress, Trainer

OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENTS_FILE = "gradients.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(trainer: Trainer) -> Path:
    """Write a checkpoint: weights, AdamW's moments, gradients of an unfinished update, random
    states, the sampler's position, and the progress."""
    parameters = trainer.parameters
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: dict(parameters)}
    optimizer: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        optimizer["rng.cuda"] = torch.cuda.get_rng_state(trainer.device)
    for name, parameter in parameters.items():
        moments = trainer.optimizer.state.get(parameter, {})
        for key in (*_MOMENTS, "step"):
            if key in moments:
                optimizer[f"{key}.{name}"] = moments[key]
    files[OPTIMIZER_FILE] = optimizer
    if trainer.progress.micro:
        files[GRADIENTS_FILE] = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    state: dict[str, Any] = {
        **asdict(trainer.progress),
        "config": trainer.engine.config.to_dict(),
        "bos_id": trainer.data.bos_id,
        "stop_ids": list(trainer.data.tokenizer.stop_ids),
        "data": trainer.data.fingerprint,
        "sampler": trainer.sampler.state_dict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return write_checkpoint(trainer.run, state, files)


def read_progress(state: dict[str, Any], source: Path) -> Progress:
    """The progress part of a checkpoint's state; raises BadInput where a field is missing or is
    no number of its kind."""
    from onelaunch.training.loop import Progress

    values: dict[str, Any] = {}
    for field in fields(Progress):
        value = state.get(field.name)
        if isinstance(field.default, int):
            good = type(value) is int and 0 <= value < 1 << 53
        else:
            absent = value is None and field.default is None
            good = absent or (isinstance(value, int | float) and math.isfinite(value))
        if not good:
            raise BadInput(
                f"{source / 'state.json'}: {field.name} is {value!r}, not what it counts"
            )
        values[field.name] = value
    return Progress(**values)


def restore(trainer: Trainer, checkpoint: Path, state: dict[str, Any]) -> None:
    """Put moments, gradients, random states and the sampler back. Weights and progress are given
    to the trainer when it is made."""
    parameters = trainer.parameters
    tensors = read_tensors(checkpoint, OPTIMIZER_FILE, state)
    source = checkpoint / OPTIMIZER_FILE
    torch.set_rng_state(_taken(tensors, "rng.cpu", source))
    if trainer.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], trainer.device)
    if state["update"]:
        for name, parameter in parameters.items():
            slots: dict[str, Tensor] = {}
            for key in _MOMENTS:
                moment = _taken(tensors, f"{key}.{name}", source).to(parameter.device)
                if moment.shape != parameter.shape:
                    raise BadInput(f"{source}: {key}.{name} has the wrong shape")
                slots[key] = moment
            step = _taken(tensors, f"step.{name}", source)
            fused = trainer.optimizer.defaults.get("fused")
            slots["step"] = step.to(parameter.device) if fused else step
            trainer.optimizer.state[parameter] = slots
    if state["micro"]:
        gradients = read_tensors(checkpoint, GRADIENTS_FILE, state)
        for name, parameter in parameters.items():
            gradient = _taken(gradients, name, checkpoint / GRADIENTS_FILE)
            if gradient.shape != parameter.shape:
                raise BadInput(f"{checkpoint / GRADIENTS_FILE}: {name} has the wrong shape")
            parameter.grad = gradient.to(parameter.device)
    trainer.sampler.load_state_dict(state.get("sampler", {}))


def _taken(tensors: dict[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in tensors:
        raise BadInput(f"{source}: the tensor {name} is missing")
    return tensors[name]
