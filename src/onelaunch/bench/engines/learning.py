"""learning: whether the losses of a run are those of PyTorch, curve on curve.

The recipe quickstart with the engine that `train.engine = "auto"` takes on the device, with the
reference engine (PyTorch, eager), and with that once more from another seed, of which weights and
batches are others. `ours` is how far the engine's losses are from the reference's, the root mean
square over the updates; `another seed` is how far that seed's are: what training itself leaves
open.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.core.tables import by_columns, document, figure
from onelaunch.training.recipe import Recipe

UNIT = "nats"
RECIPE = "quickstart"
QUICK_UPDATES = 20
AUTO, REFERENCE, OTHER_SEED = "auto", "reference", "another seed"
SEEDS = {AUTO: 1337, REFERENCE: 1337, OTHER_SEED: 1338}


def run(device: str, quick: bool, log: Log) -> list[Row]:
    """Train three times; returns one row."""
    recipe = Recipe.load(RECIPE)
    if quick:
        recipe = recipe.with_settings({"train.updates": QUICK_UPDATES}, "bench")
    losses: dict[str, list[float]] = {}
    engine = ""
    for name, seed in SEEDS.items():
        which = AUTO if name == AUTO else REFERENCE
        losses[name], made = _losses(
            recipe.with_settings({"train.seed": seed}, "bench"), device, which
        )
        engine = made if name == AUTO else engine
        log(f"{name}: the last loss is {losses[name][-1]:.4f}")
    notes: dict[str, Any] = {
        "engine": engine,
        "another_seed": round(_apart(losses[OTHER_SEED], losses[REFERENCE]), 6),
        "losses": {name: [round(loss, 5) for loss in of] for name, of in losses.items()},
    }
    n = recipe.train.updates
    return [Row(f"{RECIPE} {n} updates", _apart(losses[AUTO], losses[REFERENCE]), n=n, notes=notes)]


def _losses(recipe: Recipe, device: str, engine: str) -> tuple[list[float], str]:
    """The loss of each update, and the engine's name."""
    with timed_trainer(recipe, device, engine=engine) as trainer:
        for _ in range(recipe.train.updates):
            trainer._update()
        trainer._settle_all()
        assert trainer.metrics is not None
        trainer.metrics.flush()
        lines = trainer.metrics.path.read_text(encoding="utf-8").splitlines()
        name = trainer.engine.describe()["engine"]
    records = map(json.loads, lines)
    return [record["loss"] for record in records if record["kind"] == "update"], name


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return math.sqrt(statistics.fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    text = by_columns(
        record["rows"],
        {
            "losses apart, nats": figure("case", form=str),
            "the engine's from PyTorch's": lambda row: f"**{row['ours']:.1e}**",
            "another seed's from PyTorch's": figure("another_seed", form=".1e"),
            "last losses": lambda row: ", ".join(
                f"{name} {losses[-1]:.3f}" for name, losses in row["losses"].items()
            ),
            "engine": figure("engine", form=str),
        },
    )
    words = "Root mean square over the updates. Another seed is of the weights and of the batches."
    return document(record, "Loss curves of training on", words, text)


def draw(record: dict[str, Any]) -> plots.Figure:
    """The curves."""
    figure_, axes = plots.panels(1, 9.0, 4.0)
    (row,) = record["rows"]
    widths = {AUTO: 4.0, REFERENCE: 1.2, OTHER_SEED: 0.8}
    shown = {AUTO: f"the engine {row['engine']}", REFERENCE: "PyTorch, eager"}
    for number, (name, losses) in enumerate(row["losses"].items()):
        axes[0].plot(
            range(1, len(losses) + 1), losses, label=shown.get(name, f"PyTorch, {name}"),
            linewidth=widths[name], color=plots.COLORS[(1, 0, 7)[number]],
            alpha=0.6 if name == AUTO else 1.0,
        )  # fmt: skip
    title = f"{row['case']} on {record['device']}"
    plots.label(axes[0], "update", "loss, nats per token", title)
    return figure_
