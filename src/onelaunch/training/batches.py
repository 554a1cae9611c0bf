"""What training and evaluation ask of token data, and what its two kinds share.

Shapes: B batch, S sequence, R = S + 1 tokens of a row (its tokens and its targets overlap).
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
    """An endless stream of training batches, a pure function of data, seed and position.

    `next` draws the whole batch in a fixed order.
    """

    def next(self, batch_size: int) -> Batch:
        """(tokens_BS, targets_BS) in int64; targets are the tokens shifted by one."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: a small JSON object."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, bit for bit; raises BadInput where the state is not of this stream."""


class TokenData(Protocol):
    """Tokens with a train and a val split.

    `label` is for display, and says so where the data is synthetic; `fingerprint` identifies the
    data (with its tokenizer) and changes with it.
    """

    label: str
    synthetic: bool
    vocab_size: int
    bos_id: int | None
    tokenizer: Tokenizer
    fingerprint: str

    def train(self, seq_len: int, seed: int) -> Sampler:
        """Training batches; raises BadInput where the data is shorter than one sequence."""

    def eval_batches(
        self, split: str, seq_len: int, batch_size: int, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """The same (tokens_BS, targets_BS) each time: the whole split in windows that do not
        overlap, or `max_batches` of its batches, spread evenly."""

    def largest_id(self, split: str) -> int:
        """The largest token id of the split; that of the tokenizer where it is endless."""

    def n_tokens(self, split: str) -> int | None:
        """Tokens in the split; None where it is endless."""

    def bytes_of(self, split: str) -> int | None:
        """UTF-8 bytes of the text behind the split; None where it is endless."""


def split_rows(rows_BR: np.ndarray) -> Batch:
    """Rows of S + 1 tokens as (tokens_BS, targets_BS), each contiguous int64."""
    return (
        rows_BR[:, :-1].astype(np.int64, order="C"),
        rows_BR[:, 1:].astype(np.int64, order="C"),
    )


def check_request(split: str, seq_len: int, batch_size: int) -> None:
    """Raises BadInput for an unknown split or empty batches."""
    if split not in SPLITS:
        raise BadInput(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    if seq_len < 1 or batch_size < 1:
        raise BadInput(f"sequence length {seq_len}, batch size {batch_size}: each must be above 0")


def spread(n_batches: int, max_batches: int | None) -> list[int]:
    """Which of `n_batches` to take: all, or `max_batches` of them at even distances."""
    if max_batches is None or max_batches >= n_batches:
        return list(range(n_batches))
    return [i * n_batches // max_batches for i in range(max_batches)]


def check_state(state: Any, same: dict[str, Any], counters: tuple[str, ...]) -> None:
    """Check a sampler's saved state: `same` must be equal, `counters` whole numbers.

    Raises BadInput saying what differs.
    """
    if not isinstance(state, dict) or set(state) != {*same, *counters}:
        raise BadInput("the saved position in the data is damaged: its fields are not a sampler's")
    for key, ours in same.items():
        if type(state[key]) is not type(ours) or state[key] != ours:
            raise BadInput(
                f"the saved position belongs to other data or settings: its {key} is "
                f"{repr(state[key])[:70]}, here it is {ours!r}"
            )
    for key in counters:
        if type(state[key]) is not int or not 0 <= state[key] < 1 << 62:
            raise BadInput(f"the saved position in the data is damaged: {key}")
