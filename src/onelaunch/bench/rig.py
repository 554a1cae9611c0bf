"""A trainer to be timed update by update, outside a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onelaunch.engines.reference import ReferenceEngine
from onelaunch.model import Model
from onelaunch.training.data import open_data
from onelaunch.training.loop import Trainer
from onelaunch.training.metrics import MetricsWriter
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import make_optimizer
from onelaunch.training.signals import StopSignals


@contextmanager
def trainer(recipe: Recipe, device: str = "cpu") -> Iterator[Trainer]:
    """The loop as `onelaunch train` makes it, telemetry written to a temporary file."""
    data = open_data(recipe.data.path, recipe.train.seed)
    config = recipe.model_config(data.vocab_size)
    weights = dict(Model(config).init_weights(recipe.train.seed).state_dict())
    engine = ReferenceEngine(config, weights, device=device, train=True)
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsWriter(Path(folder) / "metrics.jsonl")
        try:
            yield Trainer(
                recipe=recipe,
                run=Path(folder),
                engine=engine,
                data=data,
                sampler=data.train(config.max_seq_len, recipe.train.seed),
                optimizer=make_optimizer(engine.parameters(), recipe),
                metrics=metrics,
                stop=StopSignals(),
                seq_len=config.max_seq_len,
            )
        finally:
            metrics.close()
