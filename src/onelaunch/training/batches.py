"""Interfaces of token data for training and evaluation, and helpers of its two kinds.

Shapes: B batch, S sequence, R = S + 1 tokens per row (tokens and targets overlap).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.errors import BadInput
from onelaunch.training.manifest import SPLITS

Batch = tuple[np.ndarray, np.ndarray]


class Sampler(Protocol):
    """An endless stream of training batches, a pure function of data, seed and position."""

    def next(self, batch_size: int) -> Batch:
        """Return the next (tokens_BS, targets_BS), int64; targets are the tokens shifted by one."""

    def skip(self, batch_size: int) -> None:
        """Move past the next batch, which another process reads."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream, a small JSON object."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, bit for bit; raises BadInput if it is of another stream."""


class TokenData(Protocol):
    """Tokens with a train and a val split.

    `label` is for display, and marks synthetic data; `fingerprint` is a hash of the data and its
    tokenizer.
    """

    label: str
    synthetic: bool
    vocab_size: int
    bos_id: int | None
    tokenizer: Tokenizer
    fingerprint: str

    def train(self, seq_len: int, seed: int) -> Sampler:
        """Make a sampler of batches; raises BadInput if the data is shorter than a sequence."""

    def eval_batches(
        self, split: str, seq_len: int, batch_size: int, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """Yield the same (tokens_BS, targets_BS) each time: the whole split in windows that do not
        overlap, or `max_batches` of its batches, evenly spaced."""

    def largest_id(self, split: str) -> int:
        """Return the largest token id of the split; that of the tokenizer if it is endless."""

    def n_tokens(self, split: str) -> int | None:
        """Return the tokens in the split; None if it is endless."""

    def bytes_of(self, split: str) -> int | None:
        """Return the UTF-8 bytes of the text of the split; None if it is endless."""


def split_rows(rows_BR: np.ndarray) -> Batch:
    """Split rows of S + 1 tokens into (tokens_BS, targets_BS), each contiguous int64."""
    return (
        rows_BR[:, :-1].astype(np.int64, order="C"),
        rows_BR[:, 1:].astype(np.int64, order="C"),
    )


def check_request(split: str, seq_len: int, batch_size: int) -> None:
    """Raise BadInput for an unknown split or empty batches."""
    if split not in SPLITS:
        raise BadInput(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if seq_len < 1 or batch_size < 1:
        raise BadInput(f"sequence length {seq_len}, batch size {batch_size}: must be positive")


def spread(n_batches: int, max_batches: int | None) -> list[int]:
    """Return the indices of `n_batches` batches, or of `max_batches` of them, evenly spaced."""
    if max_batches is None or max_batches >= n_batches:
        return list(range(n_batches))
    return [i * n_batches // max_batches for i in range(max_batches)]


def check_state(state: Any, identity: dict[str, Any], counters: tuple[str, ...]) -> None:
    """Check the saved state of a sampler: `identity` must match, `counters` be whole numbers.

    Raises BadInput naming the field.
    """
    if not isinstance(state, dict) or set(state) != {*identity, *counters}:
        raise BadInput("the saved position in the data is damaged: wrong fields")
    for key, expected in identity.items():
        if type(state[key]) is not type(expected) or state[key] != expected:
            raise BadInput(
                f"the saved position is of other data or settings: {key} is "
                f"{repr(state[key])[:70]}, not {expected!r}"
            )
    for key in counters:
        if type(state[key]) is not int or not 0 <= state[key] < 1 << 62:
            raise BadInput(f"the saved position in the data is damaged: {key}")
