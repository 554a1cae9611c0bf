"""Dropout of the CUDA engine's training step without its kernels: which elements a key keeps, and
PyTorch's model with these masks in the place of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 7


def philox(key: int, *counter: np.ndarray | int) -> list[np.ndarray]:
    """The four words of Philox4x32 (Salmon et al., 2011) for broadcast counters."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _keep(words: list[np.ndarray], which: np.ndarray, probability: float) -> Tensor:
    word = np.choose(np.broadcast_to(which, words[0].shape), words)
    return torch.from_numpy(word >= np.uint64(round(probability * 2**32)))


def keep_elements(key: int, site: int, rows: int, columns: int, probability: float) -> Tensor:
    """Those of (rows, columns) that are not dropped."""
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    return _keep(philox(key, column // 4 * 4, row, 0, 8 * site), column % 4, probability)


def keep_weights(key: int, site: int, shape: tuple[int, int, int], probability: float) -> Tensor:
    """Those of attention's weights that are not dropped, (B, H, S, S), where `shape` is B, H, S."""
    B, H, S = shape
    first_row, head = np.arange(B).reshape(B, 1, 1, 1) * S, np.arange(H).reshape(H, 1, 1)
    query, key_position = np.arange(S)[:, None], np.arange(S)[None, :]
    counter = key_position // 16 * 16, first_row + query - (query & 8), head
    words = philox(key, *counter, 8 * site + key_position % 8)
    return _keep(words, (key_position & 8) // 8 + (query & 8) // 4, probability)


def attention(q: Tensor, k: Tensor, v: Tensor, mask_BHSS: Tensor) -> Tensor:
    """Causal attention of (B, heads, S, E) whose weights are multiplied by a mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores += torch.full_like(scores[0, 0], -math.inf).triu(1)
    return (scores.softmax(-1) * mask_BHSS) @ v


@contextmanager
def masked(key: int, probability: float) -> Iterator[None]:
    """Dropout of a model in training has the masks of `key`: its calls are the sites, in order."""
    sites = count()

    def dropout(x: Tensor, p: float) -> Tensor:
        assert p == probability
        keep = keep_elements(key, next(sites), x.shape[:-1].numel(), x.shape[-1], p)
        return x * keep.view(x.shape).to(x.device) / (1 - p)

    def with_dropout(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **_: object) -> Tensor:
        assert dropout_p == probability
        B, H, S, _ = q.shape
        keep = keep_weights(key, next(sites), (B, H, S), dropout_p)
        return attention(q, k, v, keep.to(q.device) / (1 - dropout_p))

    functions = {"dropout": dropout, "scaled_dot_product_attention": with_dropout}
    with patch.multiple(F, **functions):
        yield
