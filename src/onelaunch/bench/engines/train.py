"""train: whole updates as `onelaunch train` makes them, compared with PyTorch loops.

`ours` is the wall time of an update of the trainer with its data, telemetry, clipping and AdamW, by
the engine that `train.engine = "auto"` takes. The loops train the same model and have what a
careful user writes by hand (peers/training.py): `eager` as it is, `torch.compile` with the loss
compiled, and on a GPU that with the whole update as one CUDA graph, whose loss stays there, and
`Liger`, eager with its norm and its fused product of the head with the loss, if it is installed.
All are sampled once in each round. `parts` is what the engine's threads together spent on each kind
of work; on a GPU, parts of its time. Large batches are also trained with `train.recompute` of
layers, which takes less memory and more time. `peak_bytes` are those of a GPU's memory from a
contestant's first weight to its fifth update.

On a GPU a case is also accumulated: `ours` is then a micro-step's share of an update of K of them,
and `accumulating` is forward and backward alone, of the engine without the loop.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.core.rounds import Samples, in_rounds, ratio
from onelaunch.bench.core.tables import by_columns, digits, document, figure
from onelaunch.bench.peers.training import bare_updates, graphed_updates, liger_updates
from onelaunch.config import PRESETS
from onelaunch.training.clock import StepClock
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "ms"
LAYERS_AGAIN = "ours, layers again"
LOOPS = (LAYERS_AGAIN, "eager", "Liger", "torch.compile", "torch.compile + graph")
Maker = Callable[[], Callable[[], object]]
"""Makes a contestant, which is called for an update."""
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
LEAN = ("stories15m 64x256", "stories110m 64x256")
ACCUMULATED, MICRO_STEPS = "stories15m 1x256", (1, 10, 100)
GPU_QUICK = ("stories260k 32x128", "stories15m 1x256")
SAMPLE_SECONDS, GPU_SAMPLE_SECONDS = 0.5, 0.2
PARTS_STEPS = 5


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields one row each, lower is better."""
    on_gpu = device.startswith("cuda")
    cases = GPU_CASES if on_gpu else CASES
    few = GPU_QUICK if on_gpu else QUICK
    for case in few if quick else cases:
        before = _Peak(torch.device(device))
        with _trainer(cases[case], device, 1) as trainer, ExitStack() as stack:
            others: dict[str, Maker] = {}
            if case in LEAN and on_gpu:
                lean = _trainer({**cases[case], "train.recompute": "layers"}, device, 1)
                others[LAYERS_AGAIN] = partial(_update_of, stack, lean)
            rounds = 9 if quick or on_gpu else 15
            yield _compare(f"{case} update", trainer, rounds, log, before, others)
        del trainer, others  # or the next case would begin with their memory
    for micro_steps in MICRO_STEPS if on_gpu else ():
        with _trainer(GPU_CASES[ACCUMULATED], device, micro_steps) as trainer:
            yield _accumulated(f"{ACCUMULATED} micro-step of {micro_steps}", trainer)


def _trainer(
    settings: dict[str, object], device: str, accum: int
) -> AbstractContextManager[Trainer]:
    changed = {**settings, "train.updates": 10**6, "train.accum": accum}
    recipe = Recipe().with_settings(changed, "bench")
    vocab = PRESETS[recipe.model.preset].vocab_size if recipe.model.preset else None
    return timed_trainer(recipe, device, vocab, engine="auto", on_disk=device.startswith("cuda"))


class _Peak:
    """Measures a GPU's memory from here on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0
        if device.type == "cuda":
            gc.collect()  # what was there before must not go meanwhile
            torch.cuda.synchronize(device)
            self._before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        """The most there were beyond those of before; None of a CPU."""
        if self._device.type != "cuda":
            return None
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def _update_of(stack: ExitStack, trainer: AbstractContextManager[Trainer]) -> Callable[[], object]:
    """The update of a trainer that is made here and lasts as long as the stack."""
    return stack.enter_context(trainer)._update


def _compare(
    case: str,
    trainer: Trainer,
    rounds: int,
    log: Log,
    before: _Peak,
    others: Mapping[str, Maker] | None = None,
) -> Row:
    """Ours and its peers; `others` are ours in other ways."""
    updates: dict[str, Callable[[], object]] = {}
    on_gpu = trainer.device.type == "cuda"
    makers: dict[str, Maker] = {
        OURS: lambda: trainer._update,
        **(others or {}),
        "eager": partial(bare_updates, trainer),
        "torch.compile": partial(bare_updates, trainer, compiled=True),
    }
    if on_gpu:
        makers["Liger"] = partial(liger_updates, trainer)
        makers["torch.compile + graph"] = partial(graphed_updates, trainer)
    peaks: dict[str, int | None] = {}
    for name in filter(makers.__contains__, (OURS, *LOOPS)):
        try:
            peak = before if name == OURS else _Peak(trainer.device)
            update = makers[name]()
            for _ in range(5):
                update()
            updates[name], peaks[name] = update, peak.bytes()
        except (ImportError, RuntimeError) as error:  # torch.compile without a C++ compiler
            if name == OURS:
                raise
            log(f"{case}: without {name}: {str(error).splitlines()[0]}")
    # what torch.compile leaves behind would be looked through in each collection of anyone's
    gc.collect()
    gc.freeze()
    # samples long enough that the clock's start and end do not count
    seconds = GPU_SAMPLE_SECONDS if on_gpu else SAMPLE_SECONDS
    try:
        samples: Samples = in_rounds(
            {
                name: partial(_sample, trainer, update, max(1, round(1e3 * seconds / once)))
                for name, update in updates.items()
                for once in [_sample(trainer, update, 2)]
            },
            rounds,
        )
    finally:
        gc.unfreeze()
    row = _row(case, samples, trainer)
    row.notes["peak_bytes"] = {name: n for name, n in peaks.items() if n is not None}
    return row


def _sample(trainer: Trainer, update: Callable[[], object], repeats: int) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        update()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return 1e3 * (time.perf_counter() - start) / repeats


def _accumulated(case: str, trainer: Trainer) -> Row:
    """A micro-step's share of an update, and forward and backward alone."""
    accum = trainer.recipe.train.accum
    alone = partial(trainer.engine.train_step, *_any_batch(trainer), 1.0)
    for update in (trainer._update, alone):
        for _ in range(3):
            update()
    repeats = max(1, 200 // accum)
    samples: Samples = in_rounds(
        {
            OURS: lambda: _sample(trainer, trainer._update, repeats) / accum,
            "accumulating": partial(_sample, trainer, alone, 200),
        },
        9,
    )
    notes: dict[str, Any] = {
        "accumulating": round(Row.of(case, samples["accumulating"]).ours, 6),
        "over": round(ratio(samples[OURS], samples["accumulating"]), 4),
        "engine": trainer.engine.describe()["engine"],
        "micro_steps": accum,
        "tokens": trainer.recipe.train.batch_size * trainer.seq_len,
    }
    trainer.optimizer.zero_grad(set_to_none=True)
    return Row.of(case, samples[OURS], notes=notes)


def _any_batch(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    shape = trainer.recipe.train.batch_size, trainer.seq_len
    tokens = torch.ones(shape, dtype=torch.int64, device=trainer.device)
    return tokens, tokens


def _parts(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of all threads together on each kind of work in a micro-step; or of the GPU on
    each part of one."""
    if trainer.device.type == "cuda":
        clock = StepClock(trainer.device)
        for _ in range(PARTS_STEPS):
            trainer.engine.train_step(*_any_batch(trainer), 1.0, clock.mark)
            trainer.optimizer.zero_grad(set_to_none=True)
            clock.skip()
        parts = clock.end()
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
    """The record's tables in Markdown."""
    rows = [row for row in record["rows"] if "micro_steps" not in row]
    accumulated = [row for row in record["rows"] if "micro_steps" in row]
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
            "over best peer": lambda row: f"{_over_best(row):.2f}x",
            "tokens/s": lambda row: f"{1e3 * row['tokens'] / row['ours']:,.0f}",
            "engine": figure("engine", form=str),
        },
    )
    if any(row.get("peak_bytes") for row in rows):
        text += "\n\n" + by_columns(
            rows,
            {
                "peak memory, MB": figure("case", form=str),
                **{
                    who: partial(_megabytes, who)
                    for who in (OURS, *LOOPS)
                    if any(who in row["peak_bytes"] for row in rows)
                },
            },
        )
    if accumulated:
        text += "\n\n" + by_columns(
            accumulated,
            {
                "ms a micro-step": figure("case", form=str),
                "ours": lambda row: f"**{digits(row['ours'])}**",
                "forward and backward alone": figure("accumulating"),
                "over": figure("over", form=".2f"),
            },
        )
    words = (
        "Medians in ms of a whole update: forward, backward, clipping, AdamW. `over` is the median "
        "of the rounds' own ratios."
    )
    return document(record, "An update of training on", words, text)


def _megabytes(who: str, row: dict[str, Any]) -> str:
    n_bytes = row["peak_bytes"].get(who)
    return "-" if n_bytes is None else f"{n_bytes / 1e6:,.0f}"


def _over_best(row: dict[str, Any]) -> float:
    return min(value for who, value in row["speedup"].items() if who != LAYERS_AGAIN)
