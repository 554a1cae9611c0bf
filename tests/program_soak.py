"""Training through ML Programs beside the reference trainer with weights as old, and killed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from onelaunch.bench.core.record import Row
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.training import run as training
from onelaunch.training.recipe import Recipe
from tests.kills import interrupt_until_done, outcome, run_to_the_end
from tests.metrics import read_metrics

STALENESS = 1
SETTINGS = {
    "train.updates": 20, "train.accum": 10, "train.batch_size": 2, "train.seq_len": 128,
    "eval.every": 10, "eval.batches": 4,
}  # fmt: skip
KILLED = {
    "train__engine": "coreml", "train__dropout": 0.0, "train__updates": 120,
    "checkpoint__every": 2,
}  # fmt: skip


class Stale(ReferenceEngine):
    """PyTorch, its gradients of weights that are STALENESS updates old."""

    def __init__(self, config: Any, weights: Any) -> None:
        super().__init__(config, weights, "cpu", "float32", train=True)
        self._versions = [self._copy()]

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(weights[name])

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        newest = self._copy()
        self._put(self._versions[max(0, len(self._versions) - 1 - STALENESS)])
        try:
            return super().train_step(*args, **kwargs)
        finally:
            self._put(newest)

    def after_update(self) -> None:
        self._versions.append(self._copy())


def beside_the_reference(**settings: Any) -> Row:
    """The largest relative difference of a loss, of an update or a validation."""
    recipe = Recipe.load("quickstart").with_settings(SETTINGS | settings, "soak")
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        engine = {"train.engine": "coreml", "coreml.staleness": STALENESS}
        training.start(recipe.with_settings(engine, "soak"), Path(folder) / "programs", quiet=True)
        with patch.object(
            training, "make_engine", lambda _, config, weights: Stale(config, weights)
        ):
            training.start(recipe, Path(folder) / "plain", quiet=True)
        for name in ("programs", "plain"):
            records = read_metrics(Path(folder) / name / "metrics.jsonl")
            found = {(r["kind"], r["update"]): r["loss"] for r in records if "loss" in r}
            losses.append(found)
    ours, plain = losses
    assert ours.keys() == plain.keys()
    apart = [abs(ours[key] / plain[key] - 1) for key in ours]
    return Row(
        f"{recipe.train.updates} updates of {recipe.train.accum} micro-steps beside PyTorch's",
        max(apart),
        n=len(apart),
        notes={
            "staleness": STALENESS,
            "losses": [loss for (kind, _), loss in ours.items() if kind == "update"],
            "reference": [loss for (kind, _), loss in plain.items() if kind == "update"],
            "validation": [loss for (kind, _), loss in ours.items() if kind == "eval"],
            "reference_validation": [loss for (kind, _), loss in plain.items() if kind == "eval"],
        },
    )


def killed(count: int) -> Row:
    """A run killed so many times at random moments beside one left alone."""
    with tempfile.TemporaryDirectory() as folder:
        whole, other = Path(folder) / "whole", Path(folder) / "killed"
        run_to_the_end(whole, **KILLED)
        story = interrupt_until_done(other, count, seed=11, **KILLED)
        one, two = outcome(whole), outcome(other)
        equal = json.dumps(one) == json.dumps(two)
    did = sum(part["exit"] == -9 for part in story)
    return Row(
        f"kill -9 at {count} random moments",
        did if equal else 0,
        n=len(story),
        notes={
            "losses_and_last_checkpoint_identical": equal,
            "most_updates_lost": max(part["updates_lost"] for part in story),
            "checkpoint_every": KILLED["checkpoint__every"],
            "seconds_run": [part["seconds"] for part in story],
        },
    )
