"""What a run would be: its size, bytes, operations and about how long. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onelaunch.config import ModelConfig
from onelaunch.engines.engine import TrainEngine
from onelaunch.training.data import TokenData
from onelaunch.training.flops import flops_per_token
from onelaunch.training.memory import Fit
from onelaunch.training.optim import Optimizer, state_bytes
from onelaunch.training.recipe import Recipe

PROBE_SECONDS = 2.0
FIRST_FLOPS = 4 * 10**9
"""Of the first micro-step on a CPU, at least one sequence: with less, calling operators would
dominate. stories260k computes 27 GFLOP/s on two cores, so that it takes 0.15 s there."""


def describe_run(
    recipe: Recipe,
    config: ModelConfig,
    data: TokenData,
    seq_len: int,
    fit: Fit,
    seconds: dict[str, float] | None,
) -> dict[str, Any]:
    """Return what is known of a run as plain data.

    Bytes are lower bounds. `seconds` are those of `measure_update`, without evaluations and
    checkpoints; None if unknown. `misfit` says why the run cannot fit in memory; None if it may.
    """
    train = recipe.train
    per_update = train.accum * train.batch_size * seq_len
    tokens = train.updates * per_update
    data_tokens = data.n_tokens("train")
    return {
        "model": config.to_dict(),
        "parameters": config.n_params,
        "init": train.init or None,
        "seed": train.seed,
        "data": data.label,
        "data_tokens": data_tokens,
        "updates": train.updates,
        "accum": train.accum,
        "batch_size": train.batch_size,
        "seq_len": seq_len,
        "tokens_per_update": per_update,
        "tokens": tokens,
        "epochs": tokens / data_tokens if data_tokens else None,
        "optimizer": recipe.optimizer.name,
        "schedule": recipe.optimizer.schedule,
        "peak_lr": recipe.optimizer.lr * recipe.lr_scale(),
        "memory": {
            "weight_bytes": 4 * config.n_params,
            "gradient_bytes": fit.needed.gradients,
            "optimizer_bytes": state_bytes(recipe.optimizer.name, config),
            "activation_bytes": fit.needed.batch_size * fit.needed.sequence,
            "total_bytes": fit.needed.total,
            "available_bytes": fit.available,
        },
        "misfit": fit.misfit,
        "flops": tokens * flops_per_token(config, seq_len),
        "seconds_per_update": seconds and seconds["update"],
        "seconds": seconds and seconds["update"] * train.updates,
        "measured_sequences": seconds and seconds["sequences"],
    }


def measure_update(
    engine: TrainEngine, optimizer: Optimizer, recipe: Recipe, seq_len: int
) -> dict[str, float]:
    """Measure micro-steps on random tokens, and optimizer steps, for about PROBE_SECONDS.

    The weights of the engine change. Returns the seconds of an `update`, and how many `sequences`
    the largest measured micro-step had: on a CPU they are doubled until a batch is reached or the
    time is over, and a batch is extrapolated from the last two sizes.
    """
    batch = recipe.train.batch_size
    device = next(iter(engine.parameters().values())).device
    generator = torch.Generator().manual_seed(0)
    shape = (batch, seq_len + 1)
    rows_BR = torch.randint(engine.config.vocab_size, shape, generator=generator).to(device)
    deadline = time.perf_counter() + PROBE_SECONDS

    def left(seconds: float) -> bool:
        return time.perf_counter() + seconds < deadline

    def micro_step() -> None:
        rows = rows_BR[:sequences]
        engine.train_step(rows[:, :-1], rows[:, 1:], 1.0)

    sequences = batch
    if device.type == "cpu":
        flops = flops_per_token(engine.config, seq_len) * seq_len
        sequences = min(batch, max(1, FIRST_FLOPS // flops))
    sizes = [(sequences, _seconds(micro_step, device))]
    while left(sizes[-1][1]):
        # again, as the first one of a size is slower, and other work on the machine slows either
        sizes[-1] = (sequences, min(sizes[-1][1], _seconds(micro_step, device)))
        larger = min(2 * sequences, batch)
        if sequences == batch or not left(sizes[-1][1] * larger / sequences):
            break
        sequences = larger
        sizes.append((sequences, _seconds(micro_step, device)))
    step = _seconds(optimizer.step, device)  # it makes its state
    if left(step):
        step = _seconds(optimizer.step, device)
    micro = extrapolate(sizes, batch)
    return {"update": recipe.train.accum * micro + step, "sequences": sequences}


def extrapolate(sizes: Sequence[tuple[int, float]], batch: int) -> float:
    """Return the seconds of a batch by those of smaller ones, (sequences, seconds): on the line
    through the last two, or in proportion to the only one."""
    n, seconds = sizes[-1]
    slope = seconds / n
    if len(sizes) > 1:
        before, seconds_before = sizes[-2]
        slope = max(0.0, seconds - seconds_before) / (n - before)
    return seconds + (batch - n) * slope


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start
