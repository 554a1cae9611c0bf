"""Endless token data from the built-in synthetic stories, generated when read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from onelaunch.checkpoints.tokenizers import Llama2cTokenizer, Tokenizer
from onelaunch.errors import BadInput
from onelaunch.training.batches import Batch, check_request, check_state, split_rows, spread
from onelaunch.training.shuffle import mix64
from onelaunch.training.stories import GRAMMAR_VERSION, STORIES_LABEL, story

STORIES_TOKENIZER_SHA256 = "539902b2cf1f0947a7e4ac4ca8cf8d2620375976eb5679785c3751ea9110dc59"

# The number of rows in an evaluation, always the same ones.
STORIES_EVAL_ROWS = 256
_TAGS = {"train": 0x747261696E, "val": 0x76616C}


@cache
def stories_tokenizer() -> Llama2cTokenizer:
    """Load the 512-piece tokenizer of the stories, which is part of the package."""
    data = files("onelaunch.training").joinpath("stories_tokenizer.bin").read_bytes()
    tokenizer = Llama2cTokenizer.from_bytes(data, "stories_tokenizer.bin")
    if tokenizer.fingerprint != STORIES_TOKENIZER_SHA256:
        raise BadInput("stories_tokenizer.bin: is not that of this version; reinstall onelaunch")
    return tokenizer


class StorySampler:
    """Samples rows of stories in order. A row starts with the BOS of a story, as generated text
    does, and is filled with the next stories; the rest of the last one is dropped."""

    def __init__(self, seq_len: int, seed: int, split: str, fingerprint: str) -> None:
        self._identity = {"kind": "stories", "data": fingerprint, "seq_len": seq_len, "seed": seed}
        self._series = mix64(mix64(seed) ^ _TAGS[split])
        self._seq_len = seq_len
        self._story = 0
        self._tokenizer = stories_tokenizer()

    def next(self, batch_size: int) -> Batch:
        """Return (tokens_BS, targets_BS) of the next rows."""
        rows_BR = np.empty((batch_size, self._seq_len + 1), np.int64)
        for row_R in rows_BR:
            row_R[:] = self._row()
        return split_rows(rows_BR)

    def skip(self, batch_size: int) -> None:
        """Move past the next rows. They are made all the same: a row ends where its tokens do."""
        for _ in range(batch_size):
            self._row()

    def _row(self) -> list[int]:
        ids: list[int] = []
        while len(ids) <= self._seq_len:
            ids += self._tokenizer.encode(story(self._series, self._story))
            self._story += 1
        return ids[: self._seq_len + 1]

    def state_dict(self) -> dict[str, Any]:
        """Return data, seed, sequence length and the number of the next story."""
        return {**self._identity, "story": self._story}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of the same grammar, seed and sequence length."""
        check_state(state, self._identity, ("story",))
        self._story = state["story"]


class StoryData:
    """The endless stories. Train and val are different series of the same grammar: a val story may
    also occur in train, which tens of millions of possible stories make rare."""

    def __init__(self, seed: int) -> None:
        """`seed` selects the train series for evaluations; val is always the same."""
        self.tokenizer: Tokenizer = stories_tokenizer()
        self.label = STORIES_LABEL
        self.synthetic = True
        self.vocab_size = self.tokenizer.vocab_size
        self.bos_id = self.tokenizer.bos_id
        identity = f"stories {GRAMMAR_VERSION} {self.tokenizer.fingerprint}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._seeds = {"train": seed, "val": 0}

    def train(self, seq_len: int, seed: int) -> StorySampler:
        """Make a sampler of the train series."""
        check_request("train", seq_len, 1)
        return StorySampler(seq_len, seed, "train", self.fingerprint)

    def eval_batches(
        self, split: str, seq_len: int, batch_size: int, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """Yield the first STORIES_EVAL_ROWS rows of the split, or `max_batches` of the batches."""
        check_request(split, seq_len, batch_size)
        return self._eval_batches(split, seq_len, batch_size, max_batches)

    def _eval_batches(
        self, split: str, seq_len: int, batch_size: int, max_batches: int | None
    ) -> Iterator[Batch]:
        sampler = StorySampler(seq_len, self._seeds[split], split, self.fingerprint)
        tokens_NS, targets_NS = sampler.next(STORIES_EVAL_ROWS)
        for i in spread(-(-STORIES_EVAL_ROWS // batch_size), max_batches):
            rows = slice(i * batch_size, (i + 1) * batch_size)
            yield tokens_NS[rows], targets_NS[rows]

    def largest_id(self, split: str) -> int:
        """Return that of the tokenizer, as the stories are endless."""
        return self.vocab_size - 1

    def n_tokens(self, split: str) -> None:
        """Return None: the stories are endless."""

    def bytes_of(self, split: str) -> None:
        """Return None: the stories are endless."""
