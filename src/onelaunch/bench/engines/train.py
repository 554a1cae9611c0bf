"""train: whole updates as `onelaunch train` makes them, compared with PyTorch loops.

`ours` is the wall time of an update of the trainer with its data, telemetry, clipping and AdamW, by
the engine that `train.engine = "auto"` takes. The loops train the same model and have what a
careful user writes by hand: fused AdamW with decay groups, clipping, no telemetry, no display,
batches ready in memory; `eager` as it is, `torch.compile` with the loss compiled, and on a GPU that
with the whole update as one CUDA graph, whose loss stays there. All are sampled once in each
round. `parts` is what the engine's threads together spent on each kind of work; on a GPU, parts of
its time.
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
LOOPS = ("eager", "torch.compile", "torch.compile + graph")
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
GPU_CASES: dict[str, dict[str, object]] = {
    f"{name} {batch}x{length}": {
        "model.preset": name, "model.max_seq_len": length, "train.batch_size": batch,
    }
    for name, batch, length in (
        ("stories260k", 32, 128), ("stories15m", 1, 256), ("stories15m", 64, 256),
        ("stories110m", 1, 256), ("stories110m", 64, 256), ("smollm2-135m", 16, 512),
        ("qwen3-0.6b", 4, 512),
    )
}  # fmt: skip
GPU_QUICK = ("stories260k 32x128", "stories15m 1x256")
SAMPLE_SECONDS, GPU_SAMPLE_SECONDS = 0.5, 0.2
PARTS_STEPS = 5


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields one row each, lower is better."""
    on_gpu = device.startswith("cuda")
    cases = GPU_CASES if on_gpu else CASES
    few = GPU_QUICK if on_gpu else QUICK
    for case in few if quick else cases:
        recipe = Recipe().with_settings({**cases[case], "train.updates": 10**6}, "bench")
        vocab = PRESETS[recipe.model.preset].vocab_size if recipe.model.preset else None
        with timed_trainer(recipe, device, vocab, engine="auto", on_disk=on_gpu) as trainer:
            yield _compare(f"{case} update", trainer, 9 if quick or on_gpu else 15, log)


def _compare(case: str, trainer: Trainer, rounds: int, log: Log) -> Row:
    updates: dict[str, Callable[[], object]] = {OURS: trainer._update}
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "eager": partial(bare_updates, trainer),
        "torch.compile": partial(bare_updates, trainer, compiled=True),
    }
    if trainer.device.type == "cuda":
        makers["torch.compile + graph"] = partial(graphed_updates, trainer)
    for peer in filter(makers.__contains__, LOOPS):
        try:
            updates[peer] = makers[peer]()
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
    seconds = GPU_SAMPLE_SECONDS if trainer.device.type == "cuda" else SAMPLE_SECONDS
    repeats = max(1, round(seconds / (time.perf_counter() - start)))

    def sample(name: str) -> float:
        update = updates[name]
        start = time.perf_counter()
        for _ in range(repeats):
            update()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return 1e3 * (time.perf_counter() - start) / repeats

    memory = {name: _peak_bytes(update, trainer.device) for name, update in updates.items()}
    samples: Samples = in_rounds({name: partial(sample, name) for name in updates}, rounds)
    row = _row(case, samples, trainer)
    row.notes["peak_bytes"] = {name: n for name, n in memory.items() if n is not None}
    return row


def _peak_bytes(update: Callable[[], object], device: torch.device) -> int | None:
    """Bytes on a GPU during an update, beyond what there was before it; of graphs not those that
    they keep."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    update()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _parts(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of all threads together on each kind of work in a micro-step; or of the GPU on
    each part of one."""
    if trainer.device.type == "cuda":
        trainer._clock.begin()
        for _ in range(PARTS_STEPS):
            trainer._micro_step()
        trainer.optimizer.zero_grad(set_to_none=True)
        parts = trainer._clock.end()
        return {part: round(1e3 * s / PARTS_STEPS, 3) for part, s in parts.items() if s > 0}
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
            **{
                peer: figure("peers", peer)
                for peer in LOOPS
                if any(peer in row["peers"] for row in rows)
            },
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


def _model_and_optimizer(
    trainer: Trainer, capturable: bool = False
) -> tuple[Model, torch.optim.Optimizer, list[tuple[torch.Tensor, ...]]]:
    """The same model, what updates it, and batches of the same kind."""
    recipe, device = trainer.recipe, trainer.device
    o = recipe.optimizer
    model = Model(trainer.engine.config).init_weights(0).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=True, capturable=capturable
    )
    sampler = trainer.data.train(trainer.seq_len, seed=1)
    batches = [
        tuple(torch.from_numpy(a).to(device) for a in sampler.next(recipe.train.batch_size))
        for _ in range(32)
    ]
    return model, optimizer, batches


def graphed_updates(trainer: Trainer) -> Callable[[], None]:
    """The same with the loss compiled and a whole update in one CUDA graph; the loss stays on the
    device."""
    model, optimizer, batches = _model_and_optimizer(trainer, capturable=True)
    clip, parameters = trainer.recipe.optimizer.grad_clip, list(model.parameters())
    tokens, targets = (tensor.clone() for tensor in batches[0])
    torch.compiler.reset()
    loss_of = torch.compile(model.loss, dynamic=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    position = 0

    def update() -> None:
        nonlocal position
        for static, batch in zip((tokens, targets), batches[position % len(batches)], strict=True):
            static.copy_(batch)
        position += 1
        graph.replay()

    return update


def bare_updates(trainer: Trainer, compiled: bool = False) -> Callable[[], float]:
    """A hand-written loop of the same model on the same kind of batch; each call is one update and
    returns its loss."""
    device, clip = trainer.device, trainer.recipe.optimizer.grad_clip
    model, optimizer, batches = _model_and_optimizer(trainer)
    parameters = list(model.parameters())
    position = 0
    # what ours computes in: bfloat16 on a GPU
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if compiled:
        torch.compiler.reset()  # the cases before are no shapes of this one
    loss_of = torch.compile(model.loss) if compiled else model.loss

    def update() -> float:
        nonlocal position
        tokens, targets = batches[position % len(batches)]
        position += 1
        with autocast:
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return update
