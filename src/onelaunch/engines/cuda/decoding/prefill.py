"""Prompts through the forward: keys and values of every position, logits of the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.decoding.chain import bucket
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import BoundForward, Shape

MAX_PROMPT = 2048
_SHORTEST = 16


class Prompts:
    """Reads prompts of up to MAX_PROMPT tokens, one at a time. Of each power of two that a prompt's
    length was rounded up to a forward is bound and kept; from its second use on as a CUDA graph.
    Whoever reads one waits for it before the next."""

    def __init__(self, config: ModelConfig, packed: PackedModel) -> None:
        self._config, self._packed = config, packed
        self._forwards: dict[int, BoundForward] = {}
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | None] = {}
        self._on_gpu = packed.embedding.device.type == "cuda"
        self._ids = torch.zeros(MAX_PROMPT, dtype=torch.int64, pin_memory=self._on_gpu)

    def forward(self, n: int) -> BoundForward:
        """That of prompts of n tokens."""
        length = min(max(_SHORTEST, bucket(n)), self._config.max_seq_len, MAX_PROMPT)
        if length not in self._forwards:
            shape = Shape(1, length, False, torch.float32, keep_qkv=True)
            self._forwards[length] = BoundForward(self._config, self._packed, shape, {})
        return self._forwards[length]

    def calls(self, n: int, with_logits: bool) -> list[Any]:
        """Calls of the forward of n tokens, of which each has another kernel."""
        calls = self.forward(n).calls
        each = len(calls[1:-1]) // self._config.n_layers
        return [*calls[: 1 + each], *calls[-1:]] if with_logits else calls[: 1 + each]

    def read(self, prompt_ids: Sequence[int], keys: Tensor, values: Tensor) -> Tensor:
        """The last position's logits, (1, V), float32. Keys and values of all positions are written
        into a slot's cache, (L, K, context, E) each."""
        forward = self._read(prompt_ids, keys, values, with_logits=True)
        return forward.buffers.logits

    def keep(self, prompt_ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Keys and values alone."""
        if prompt_ids:
            self._read(prompt_ids, keys, values, with_logits=False)

    def _read(
        self, prompt_ids: Sequence[int], keys: Tensor, values: Tensor, with_logits: bool
    ) -> BoundForward:
        c, n = self._config, len(prompt_ids)
        forward = self.forward(n)
        length = forward.plan.sequence
        # what stands behind a prompt has no effect on it
        self._ids[:n] = torch.tensor(prompt_ids, dtype=torch.int64)
        self._ids[n:length] = 0
        forward.buffers.tokens.copy_(self._ids[:length], non_blocking=True)
        if with_logits:
            forward.buffers.of.fill_(n - 1)
        self._run(forward, with_logits)
        kept_LNX = forward.buffers.qkv[:, :n, c.q_dim :]
        for cache, columns_LNX in zip((keys, values), kept_LNX.split(c.kv_dim, -1), strict=True):
            heads = columns_LNX.unflatten(-1, (c.n_kv_heads, c.head_dim)).transpose(1, 2)
            cache[:, :, :n].copy_(heads)
        return forward

    def _run(self, forward: BoundForward, with_logits: bool) -> None:
        """Launched at its first use, captured and replayed from its second."""
        key = (forward.plan.sequence, with_logits)
        if self._on_gpu and key in self._graphs and self._graphs[key] is None:
            self._graphs[key] = forward.captured(with_logits)
        graph = self._graphs.setdefault(key, None)
        if graph is None:
            forward.run(with_logits)
        else:
            graph.replay()
