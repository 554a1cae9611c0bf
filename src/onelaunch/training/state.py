"""Save and restore the complete state of a run, so that a resume is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.checkpoints.run_folder import (
    MODEL_FILE,
    change_state,
    checkpoint_name,
    read_tensors,
    write_checkpoint,
)
from onelaunch.engines.engine import TrainEngine
from onelaunch.errors import BadInput
from onelaunch.training.data import Sampler, TokenData
from onelaunch.training.optim import (
    Optimizer,
    load_state_tensors,
    optimizer_name,
    state_tensors,
)
from onelaunch.training.ranks import ALONE, Ranks

OPTIMIZER_FILE = "optimizer.safetensors"
ENGINE_FILE = "engine.safetensors"
LOSS_SUM = "loss_sum"
"""Among a rank's gradients of an unfinished update: the sum of its losses."""


@dataclass
class Progress:
    """The progress of a run, saved in checkpoints. Losses are in nats per token."""

    update: int = 0
    micro: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    evaluated: int = 0
    val_loss: float | None = None
    best_update: int = 0
    best_val_loss: float | None = None


def save(
    run: Path,
    progress: Progress,
    engine: TrainEngine,
    optimizer: Optimizer,
    data: TokenData,
    sampler: Sampler,
    accum: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint: weights, the states of optimizer and engine, gradients of an unfinished
    update, random states, the position of the sampler, and the progress.

    Each rank calls it; the first writes, its own state and the others' gradients and sums of losses
    of an unfinished update.
    """
    parameters = engine.parameters()
    unfinished = list(_gather_unfinished(progress, parameters, ranks)) if progress.micro else []
    if not ranks.writes:
        return run / "checkpoints" / checkpoint_name(progress.update, progress.micro)
    device = next(iter(parameters.values())).device
    files: dict[str, dict[str, Tensor]] = {MODEL_FILE: dict(parameters)}
    slots: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        slots["rng.cuda"] = torch.cuda.get_rng_state(device)
    files[OPTIMIZER_FILE] = slots | state_tensors(optimizer, parameters)
    files |= {_gradients_file(rank): tensors for rank, tensors in enumerate(unfinished)}
    if engine_state := engine.state_dict():
        files[ENGINE_FILE] = engine_state
    state: dict[str, Any] = {
        **asdict(progress),
        "accum": accum,
        "optimizer": optimizer_name(optimizer),
        "ranks": ranks.size,
        "config": engine.config.to_dict(),
        "bos_id": data.bos_id,
        "stop_ids": list(data.tokenizer.stop_ids),
        "data": data.fingerprint,
        "sampler": sampler.state_dict(),
        "engine": engine.describe()["engine"],
        "norm": engine.describe().get("norm"),
        "forms": engine.describe().get("forms"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return write_checkpoint(run, state, files)


def _gather_unfinished(
    progress: Progress, parameters: Mapping[str, Tensor], ranks: Ranks
) -> Iterator[dict[str, Tensor]]:
    """Yield to the first rank the gradients of each rank by name, and where there are several its
    sum of losses. Each rank calls it."""
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    if ranks.size == 1:
        yield gradients
        return
    gradients[LOSS_SUM] = torch.tensor([progress.loss_sum])
    parts = [gradients[name].cpu().flatten() for name in gradients]
    for flat_N in ranks.gather(torch.cat(parts)):
        split = flat_N.split([part.numel() for part in parts])
        yield {n: v.view_as(g) for (n, g), v in zip(gradients.items(), split, strict=True)}


def _gradients_file(rank: int) -> str:
    return f"gradients-{rank}.safetensors" if rank else "gradients.safetensors"


def save_progress(checkpoint: Path, progress: Progress) -> None:
    """Write the result of an evaluation into the checkpoint that was saved before it."""
    change_state(checkpoint, asdict(progress))


def read_progress(state: dict[str, Any], source: Path) -> Progress:
    """Read the progress in the state of a checkpoint; raises BadInput for a missing or invalid
    field."""
    values: dict[str, Any] = {}
    for field in fields(Progress):
        value = state.get(field.name)
        if isinstance(field.default, int):
            valid = type(value) is int and 0 <= value < 1 << 53
        else:
            absent = value is None and field.default is None
            valid = absent or (isinstance(value, int | float) and abs(value) < 1e300)
        if not valid:
            raise BadInput(f"{source / 'state.json'}: {field.name} is {value!r}, which is invalid")
        values[field.name] = value
    return Progress(**values)


def restore(
    checkpoint: Path,
    state: dict[str, Any],
    engine: TrainEngine,
    optimizer: Optimizer,
    sampler: Sampler,
    progress: Progress,
    rank: int = 0,
) -> None:
    """Restore the states of optimizer, random numbers, sampler and engine, and gradients; of an
    unfinished update, a rank's own gradients, and its sum of losses in `progress`. Weights and
    progress are arguments of the engine and the trainer."""
    parameters = engine.parameters()
    device = next(iter(parameters.values())).device
    tensors = read_tensors(checkpoint, OPTIMIZER_FILE, state)
    source = checkpoint / OPTIMIZER_FILE
    torch.set_rng_state(_tensor(tensors, "rng.cpu", source))
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    if state["update"]:
        load_state_tensors(optimizer, parameters, tensors, source)
    if state["micro"]:
        source = checkpoint / _gradients_file(rank)
        gradients = read_tensors(checkpoint, source.name, state)
        for name, parameter in parameters.items():
            gradient = _tensor(gradients, name, source)
            if gradient.shape != parameter.shape:
                raise BadInput(f"{source}: {name} has the wrong shape")
            parameter.grad = gradient.to(parameter.device)
        if rank:
            progress.loss_sum = _tensor(gradients, LOSS_SUM, source).item()
    engine_state = {}
    if ENGINE_FILE in state["sha256"]:
        engine_state = read_tensors(checkpoint, ENGINE_FILE, state)
        for name, tensor in engine_state.items():
            match = parameters.get(name.partition(".")[2])
            if match is None or tensor.shape != match.shape:
                raise BadInput(f"{checkpoint / ENGINE_FILE}: {name} does not match the model")
    engine.load_state_dict(engine_state, state["update"])
    sampler.load_state_dict(state.get("sampler", {}))


def _tensor(tensors: dict[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in tensors:
        raise BadInput(f"{source}: the tensor {name} is missing")
    return tensors[name]
