"""Two contestants timed alternately, and a trainer to be timed update by update."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from onelaunch.bench.core.record import Row
from onelaunch.bench.core.rounds import in_rounds
from onelaunch.model import Model
from onelaunch.training.batches import Sampler
from onelaunch.training.data import open_data
from onelaunch.training.engines import make_engine
from onelaunch.training.loop import Trainer
from onelaunch.training.manifest import SplitFacts
from onelaunch.training.metrics import MetricsWriter
from onelaunch.training.optim import make_optimizer
from onelaunch.training.recipe import Recipe
from onelaunch.training.signals import StopSignals
from onelaunch.training.token_files import FileSampler, TokenFile

TOKENS_ON_DISK = 1 << 24
"""Of the file of random ones."""


def in_turn(
    ours: Callable[[], object], peer: Callable[[], object], work: float, repeats: int, blocks: int
) -> tuple[list[float], list[float], list[float]]:
    """Rates of ours and of a peer, `work` units a call, and their ratio block by block."""

    def rate(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return repeats * work / (time.perf_counter() - start)

    rates = in_rounds({"ours": partial(rate, ours), "peer": partial(rate, peer)}, blocks)
    ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
    return rates["ours"], rates["peer"], ratios


def compared_row(
    case: str,
    samples: tuple[Sequence[float], Sequence[float], Sequence[float]],
    peer_name: str,
    **notes: object,
) -> Row:
    """The record's row of what `in_turn` returned."""
    ours, peer, ratio = (Row.of(case, values) for values in samples)
    ours.peers = {peer_name: peer.ours}
    ours.notes = {
        "ratio": round(ratio.ours, 4),
        "ratio_spread": [round(v, 4) for v in ratio.spread or ()],
        "threads": torch.get_num_threads(),
        **notes,
    }
    return ours


@contextmanager
def trainer(
    recipe: Recipe,
    device: str = "cpu",
    vocab_size: int | None = None,
    engine: str = "reference",
    on_disk: bool = False,
) -> Iterator[Trainer]:
    """The loop as `onelaunch train` makes it, telemetry written to a temporary file.

    `vocab_size` widens the model's vocabulary beyond the data's, to that of a preset; `engine` is a
    recipe's `train.engine`. `on_disk`: batches are read from a file of random tokens, as those of
    prepared text are; the built-in stories are written as they are read, which takes longer.
    """
    data = open_data(recipe.data.path, recipe.train.seed)
    config = recipe.model_config(data.vocab_size)
    config = replace(config, vocab_size=vocab_size or config.vocab_size)
    weights = dict(Model(config).init_weights(recipe.train.seed).state_dict())
    how = recipe.train
    where = recipe.with_settings({"train.device": device, "train.engine": engine}, "bench")
    made = make_engine(where, config, weights)
    seq_len = how.seq_len or config.max_seq_len
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsWriter(Path(folder) / "metrics.jsonl")
        sampler = data.train(seq_len, how.seed)
        if on_disk:
            sampler = _from_disk(Path(folder), config.vocab_size, seq_len)
        try:
            yield Trainer(
                recipe=recipe,
                run=Path(folder),
                engine=made,
                data=data,
                sampler=sampler,
                optimizer=make_optimizer(made.parameters(), recipe, made.flat),
                metrics=metrics,
                stop=StopSignals(),
                seq_len=seq_len,
            )
        finally:
            made.close()
            metrics.close()


def _from_disk(folder: Path, vocab_size: int, seq_len: int) -> Sampler:
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    tokens = np.random.default_rng(0).integers(vocab_size, size=TOKENS_ON_DISK, dtype=dtype)
    path = folder / "train.bin"
    tokens.tofile(path)
    facts = SplitFacts(path.name, len(tokens), 0, 0, "")
    return FileSampler(TokenFile(path, facts, dtype, vocab_size), seq_len, 0, "")
