"""rms-norm-training: a training step with our RMSNorm and with PyTorch's.

Forward, backward, clipping and AdamW, as the trainer does them, telemetry included; eager and
through torch.compile. The models have their presets' vocabularies, whatever the data's is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from onelaunch.bench.core import plots
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import in_turn
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.core.tables import Cell, by_columns, digits, document, figure, spread
from onelaunch.bench.core.timing import milliseconds
from onelaunch.bench.peers.rms_norm import has_kernel
from onelaunch.config import preset
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "ms/step"

Case = tuple[str, int, int, bool]
"""Preset, batch, sequence, whether compiled."""

CASES: tuple[Case, ...] = tuple(
    (name, batch, 256, compiled)
    for name in ("stories15m", "stories110m")
    for batch in (64, 1)
    for compiled in (False, True)
)
QUICK: tuple[Case, ...] = (("stories15m", 1, 256, False), ("stories15m", 1, 256, True))
CPU_CASES: tuple[Case, ...] = (("stories260k", 8, 128, False), ("stories260k", 1, 128, False))
CPU_QUICK: tuple[Case, ...] = CPU_CASES[:1]

WARM_STEPS = 5
BLOCK_SECONDS = 0.4
BLOCKS, QUICK_BLOCKS = 15, 9


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields a row each, lower is better."""
    if has_kernel(torch.device(device), log):
        cases = QUICK if quick else CASES
    else:
        log("a small model, eager alone")
        cases = CPU_QUICK if quick else CPU_CASES
    for case in cases:
        yield _compare(case, device, QUICK_BLOCKS if quick else BLOCKS)


def _compare(case: Case, device: str, blocks: int) -> Row:
    name, batch, seq_len, compiled = case
    vocab_size = preset(name).vocab_size
    # a second shape of one function would be compiled for any shape
    torch.compiler.reset()
    with ExitStack() as stack:
        ours, torch_ = (
            stack.enter_context(timed_trainer(_recipe(case, norm), device, vocab_size=vocab_size))
            for norm in ("onelaunch", "torch")
        )
        seconds = min(_warm_seconds(ours), _warm_seconds(torch_))
        repeats = max(1, round(BLOCK_SECONDS / seconds))
        rates = in_turn(ours._update, torch_._update, 1, repeats, blocks)
        dtype = str(ours.engine.describe()["dtype"])
    ours_ms, torch_ms = ([1e3 / rate for rate in samples] for samples in rates[:2])
    ratio = Row.of("", [1 / r for r in rates[2]])
    return Row.of(
        f"{name} {batch}x{seq_len} {'compiled' if compiled else 'eager'}",
        ours_ms,
        peers={"torch": statistics.median(torch_ms)},
        notes={
            "ratio": round(ratio.ours, 4),
            "ratio_spread": [round(v, 4) for v in ratio.spread or ()],
            "steps_per_block": repeats,
            "vocab_size": vocab_size,
            "dtype": dtype,
            # the residual stream, which autocast leaves as the embedding made it
            "norm_input": "float32",
        },
    )


def _warm_seconds(trainer: Trainer) -> float:
    """The seconds of an update after WARM_STEPS others."""
    for _ in range(WARM_STEPS):
        trainer._update()
    return 1e-3 * milliseconds(trainer._update)


def _recipe(case: Case, norm: str) -> Recipe:
    name, batch, seq_len, compiled = case
    settings: dict[str, object] = {
        "model.preset": name, "train.batch_size": batch, "train.seq_len": seq_len,
        "train.compile": compiled, "train.norm": norm, "train.updates": 10**6,
    }  # fmt: skip
    return Recipe().with_settings(settings, "bench")


def table(record: dict[str, Any]) -> str:
    """The record's tables in Markdown: milliseconds a step with either norm."""
    columns: dict[str, Cell] = {
        "model, batch x sequence": figure("case", form=str),
        "ours, ms": figure("ours"),
        "p20-p80": spread,
        "torch, ms": figure("peers", "torch"),
        "ours / torch": figure("ratio", form=".3f"),
        "p20-p80 of pairs": figure("ratio_spread", form=_ends),
    }
    title = "A training step with our RMSNorm and with PyTorch's, on"
    return document(record, title, by_columns(record["rows"], columns))


def _ends(spread: Sequence[float]) -> str:
    return "-".join(f"{end:.3f}" for end in spread) or "-"


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Points: time of ours over time of torch, with the spread of the pairs."""
    rows = record["rows"]
    if not rows:
        return None
    figure = plots.new_figure(8, 1.4 + 0.4 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    ratios = [row["ratio"] for row in rows]
    spreads = [row.get("ratio_spread") or (row["ratio"], row["ratio"]) for row in rows]
    low = [max(0.0, ratio - ends[0]) for ratio, ends in zip(ratios, spreads, strict=True)]
    high = [max(0.0, ends[1] - ratio) for ratio, ends in zip(ratios, spreads, strict=True)]
    axes.errorbar(ratios, places, xerr=[low, high], fmt="o", color="#1f5a8f", capsize=3)
    axes.axvline(1.0, color="black", linewidth=1)
    # 1 in the middle; at least 2% either way, lest noise look like a difference
    reach = 1.15 * max([0.02, *(abs(end - 1) for spread in spreads for end in spread)])
    axes.set_xlim(1 - reach, 1 + reach)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    names = [
        f"{row['case']}\n{digits(row['ours'])} / {digits(row['peers']['torch'])} ms" for row in rows
    ]
    axes.set_yticks(places, names, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "step time, ours / torch; below 1 ours is faster (bars: 20th to 80th percentile of pairs)",
        fontsize=8,
    )
    axes.set_title(f"Training step by RMSNorm on {record['device']}", fontsize=10)
    return figure
