"""Validation loss: mean cross-entropy over batches, or over the whole validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.checkpoints.tokenizer_compare import same_tokenizer
from onelaunch.checkpoints.tokenizers import check_ids, find_tokenizer, size_note
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.engines.engine import LogitsEngine, LossEngine
from onelaunch.errors import BadInput, MissingExtra
from onelaunch.training.data import TokenData
from onelaunch.training.ranks import ALONE, Ranks

# Longer contexts are evaluated in windows of this.
MAX_WINDOW = 2048
BATCH_TOKENS = 8192
# numbers in the logits of a batch, 0.5 GB in float32; a single window may have more
BATCH_LOGITS = 1 << 27


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per token over `tokens` predicted tokens; `whole` unless it was stopped."""

    loss: float
    tokens: int
    whole: bool = True


def evaluate(
    engine: LogitsEngine,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Return the mean loss over (tokens_BS, targets_BS) batches. `stop` is polled before each.

    Of several ranks each computes every n-th batch, and all return the same.
    """
    total, count, stopped = 0.0, 0, False
    for tokens_BS, targets_BS in islice(batches, ranks.rank, None, ranks.size):
        if stopped := stop():
            break
        total += _loss_sum(engine, torch.from_numpy(tokens_BS), torch.from_numpy(targets_BS))
        count += targets_BS.size
        progress(count)
    total, n_tokens, n_stopped = ranks.add(total, count, stopped)
    count = int(n_tokens)
    if n_stopped:
        return Evaluation(float("nan"), count, whole=False)
    return Evaluation(total / max(1, count), count)


def _loss_sum(engine: LogitsEngine, tokens_BS: Tensor, targets_BS: Tensor) -> float:
    if isinstance(engine, LossEngine):
        return engine.loss_sum(tokens_BS, targets_BS)
    logits_BSV = engine.logits(tokens_BS)
    targets = targets_BS.to(logits_BSV.device).flatten()
    return F.cross_entropy(logits_BSV.flatten(0, 1), targets, reduction="sum").item()


@dataclass(frozen=True)
class SplitLoss:
    """The loss over a whole validation split.

    loss: nats per token, over `tokens` predicted tokens in windows of `window` without overlap.
    nats_per_byte: nats per UTF-8 byte of text; None if the bytes are unknown.
    data: the label of the data; `synthetic` for the built-in stories.
    """

    loss: float
    nats_per_byte: float | None
    tokens: int
    window: int
    data: str
    synthetic: bool

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate_split(
    engine: LogitsEngine, tokens: TokenData, progress: Callable[[str], None] = lambda text: None
) -> SplitLoss:
    """Evaluate the validation split, in windows of the model's context, at most MAX_WINDOW.

    `progress` is called with the number of tokens so far, as text."""
    config = engine.config
    window = min(config.max_seq_len, MAX_WINDOW)
    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // config.vocab_size)
    batches = tokens.eval_batches("val", window, max(1, batch_tokens // window))
    total = tokens.n_tokens("val")
    share = f" of {total:,}" if total else ""
    result = evaluate(engine, batches, progress=lambda done: progress(f"{done:,}{share} tokens"))
    n_bytes = tokens.bytes_of("val")
    per_byte = result.loss * result.tokens / n_bytes if n_bytes else None
    return SplitLoss(result.loss, per_byte, result.tokens, window, tokens.label, tokens.synthetic)


def check_tokenizer(
    model: LoadedModel, name: str, data: str, tokens: TokenData, log: Callable[[str], None]
) -> None:
    """Raise BadInput if the tokenizer of `data` is not that of the model `name`, or has ids outside
    its vocabulary; `log` gets a line if the tokenizers cannot be compared."""
    config, data_tokenizer = model.config, tokens.tokenizer
    note = size_note(data_tokenizer, config)
    try:
        own = find_tokenizer(model)
    except (BadInput, MissingExtra) as error:
        log(f"note: the model's tokenizer cannot be compared with the data's: {error}")
        own = None
    # a tokenizer of another size, in the same folder by chance, does not belong to the model
    if own is not None and (note or not size_note(own, config)):
        if not same_tokenizer(own, data_tokenizer):
            raise BadInput(
                f"data={data!r}: its tokenizer is not that of {name}; prepare the text with the "
                "model's tokenizer (`onelaunch prepare --tokenizer FILE`)"
            )
    elif note:
        log(note.replace("the tokenizer", "the data's tokenizer"))
    check_ids(data_tokenizer, [tokens.largest_id("val")], config, f"data={data!r}")
