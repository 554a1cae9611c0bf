"""training-speed: the trainer, with telemetry, compared with a bare PyTorch loop of the same model.

The bare loop has what a careful user writes by hand: fused AdamW with decay groups, clipping, no
telemetry, no display, batches ready in memory. Blocks of updates are interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import compared_row, in_turn
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.model import Model
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "tokens/s"

CASES: dict[str, dict[str, object]] = {
    "stories260k 32x128": {"model.preset": "stories260k", "model.max_seq_len": 128},
    "shakespeare-char 12x64": {
        "model.dim": 128, "model.n_layers": 4, "model.n_heads": 4, "model.hidden_dim": 352,
        "model.max_seq_len": 64, "train.batch_size": 12,
    },
    "stories15m 4x256": {"model.preset": "stories15m", "train.batch_size": 4},
}  # fmt: skip
QUICK = ("stories260k 32x128", "shakespeare-char 12x64")


def run(device: str, quick: bool, log: Log) -> list[Row]:
    """Time every case; returns one row each, higher is better."""
    rows = []
    for case in QUICK if quick else CASES:
        recipe = Recipe().with_settings({**CASES[case], "train.updates": 10**6}, "bench")
        with timed_trainer(recipe, device) as trainer:
            rows.append(_compare(case, trainer, blocks=9 if quick else 25))
    return rows


def _compare(case: str, trainer: Trainer, blocks: int) -> Row:
    tokens = trainer.recipe.train.batch_size * trainer.seq_len
    bare = bare_updates(trainer)
    ours_update = trainer._update
    for _ in range(3):
        bare()
        ours_update()
    start = time.perf_counter()
    bare()
    # blocks long enough that the clock's start and end do not count
    repeats = max(1, round(0.5 / (time.perf_counter() - start)))
    samples = in_turn(ours_update, bare, tokens, repeats, blocks)
    return compared_row(case, samples, "bare loop", updates_per_block=repeats)


def bare_updates(trainer: Trainer) -> Callable[[], float]:
    """A hand-written loop of the same model on the same kind of batch; each call is one update and
    returns its loss."""
    recipe, device = trainer.recipe, trainer.device
    o = recipe.optimizer
    model = Model(trainer.engine.config).init_weights(0).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=True)
    sampler = trainer.data.train(trainer.seq_len, seed=1)
    batches = [
        tuple(torch.from_numpy(a).to(device) for a in sampler.next(recipe.train.batch_size))
        for _ in range(32)
    ]
    position = 0
    # what ours computes in: bfloat16 on a GPU
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def update() -> float:
        nonlocal position
        tokens, targets = batches[position % len(batches)]
        position += 1
        with autocast:
            loss = model.loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update
