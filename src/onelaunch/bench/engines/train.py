"""train: whole updates as `onelaunch train` makes them, compared with PyTorch loops.

`ours` is the wall time of an update of the trainer with its data, telemetry, clipping and AdamW, by
the engine that `train.engine = "auto"` takes. The loops train the same model and have what a
careful user writes by hand: fused AdamW with decay groups, clipping, no telemetry, no display,
batches ready in memory; `eager` as it is, `torch.compile` with the loss compiled. All are sampled
once in each round. `parts` is what the engine's threads together spent on each kind of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.core.rounds import Samples, in_rounds, ratio
from onelaunch.bench.core.tables import by_columns, digits, document, figure
from onelaunch.config import PRESETS
from onelaunch.model import Model
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "ms"
LOOPS = ("eager", "torch.compile")
OURS = "ours"

CASES: dict[str, dict[str, object]] = {
    "stories260k 32x128": {"model.preset": "stories260k", "model.max_seq_len": 128},
    "shakespeare-char 12x64": {
        "model.dim": 128, "model.n_layers": 4, "model.n_heads": 4, "model.hidden_dim": 352,
        "model.max_seq_len": 64, "train.batch_size": 12,
    },
    "stories15m 1x256": {"model.preset": "stories15m", "train.batch_size": 1},
    "stories15m 4x256": {"model.preset": "stories15m", "train.batch_size": 4},
}  # fmt: skip
QUICK = ("stories260k 32x128", "shakespeare-char 12x64")
SAMPLE_SECONDS = 0.5
PARTS_STEPS = 5


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields one row each, lower is better."""
    for case in QUICK if quick else CASES:
        recipe = Recipe().with_settings({**CASES[case], "train.updates": 10**6}, "bench")
        vocab = PRESETS[recipe.model.preset].vocab_size if recipe.model.preset else None
        with timed_trainer(recipe, device, vocab, engine="auto") as trainer:
            yield _compare(f"{case} update", trainer, 9 if quick else 15, log)


def _compare(case: str, trainer: Trainer, rounds: int, log: Log) -> Row:
    updates: dict[str, Callable[[], object]] = {OURS: trainer._update}
    for peer in LOOPS:
        try:
            updates[peer] = bare_updates(trainer, compiled=peer == "torch.compile")
            updates[peer]()
        except RuntimeError as error:  # torch.compile without a C++ compiler
            log(f"{case}: without {peer}: {str(error).splitlines()[0]}")
            updates.pop(peer, None)
    for update in updates.values():
        for _ in range(3):
            update()
    start = time.perf_counter()
    updates[OURS]()
    # samples long enough that the clock's start and end do not count
    repeats = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))

    def sample(name: str) -> float:
        update = updates[name]
        start = time.perf_counter()
        for _ in range(repeats):
            update()
        return 1e3 * (time.perf_counter() - start) / repeats

    samples: Samples = in_rounds({name: partial(sample, name) for name in updates}, rounds)
    return _row(case, samples, trainer)


def _parts(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of all threads together on each kind of work in a micro-step."""
    trainer.engine.telemetry()
    for _ in range(PARTS_STEPS):
        trainer._micro_step()
    spent = trainer.engine.telemetry().get("thread_seconds", {})
    return {kind: round(1e3 * seconds / PARTS_STEPS, 3) for kind, seconds in spent.items()}


def _row(case: str, samples: Samples, trainer: Trainer) -> Row:
    peers = {name: Row.of(case, values).ours for name, values in samples.items() if name != OURS}
    notes: dict[str, Any] = {
        "speedup": {name: round(ratio(samples[name], samples[OURS]), 4) for name in peers},
        "engine": trainer.engine.describe()["engine"],
        "threads": torch.get_num_threads(),
        "tokens": trainer.recipe.train.batch_size * trainer.seq_len,
        "parts": _parts(trainer),
    }
    return Row.of(case, samples[OURS], peers=peers, notes=notes)


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    rows = record["rows"]
    text = by_columns(
        rows,
        {
            "ms": figure("case", form=str),
            "ours": lambda row: f"**{digits(row['ours'])}**",
            **{peer: figure("peers", peer) for peer in LOOPS},
            "over best peer": lambda row: f"{min(row['speedup'].values()):.2f}x",
            "tokens/s": lambda row: f"{1e3 * row['tokens'] / row['ours']:,.0f}",
            "engine": figure("engine", form=str),
        },
    )
    words = (
        "Medians in ms of a whole update: forward, backward, clipping, AdamW. `over` is the median "
        "of the rounds' own ratios."
    )
    return document(record, "An update of training on", words, text)


def bare_updates(trainer: Trainer, compiled: bool = False) -> Callable[[], float]:
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
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def update() -> float:
        nonlocal position
        tokens, targets = batches[position % len(batches)]
        position += 1
        with autocast:
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return update
