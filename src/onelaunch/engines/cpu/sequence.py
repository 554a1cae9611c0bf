"""A sequence that grows in the compiled program: its tokens, cache and sampling, in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.layout import End
from onelaunch.engines.cpu.pack import Memory
from onelaunch.engines.cpu.tables import Table
from onelaunch.engines.engine import Request
from onelaunch.engines.sampling import request_uniforms


class CachedSequence:
    """A request that grows by up to `n` tokens, and its keys and values, for vectors of `lanes`
    floats."""

    def __init__(self, config: ModelConfig, lanes: int, request: Request, n: int) -> None:
        ids, sampling, stop_ids = request.prompt_ids, request.sampling, request.stop_ids
        self.request, self.sampling = request, sampling
        self.prompt = len(ids)
        self.limit = self.prompt + n
        self.ids = torch.zeros(self.limit + 1, dtype=torch.int32)
        self.ids[: self.prompt] = torch.tensor(ids, dtype=torch.int32)
        self.size = self.prompt
        self.read = 0
        self.end = End.NONE
        self.blocks = -(-self.limit // lanes)
        self.shape = (config.n_layers, 2, config.n_kv_heads, self.blocks, config.head_dim, lanes)
        # in small pages: only what a sequence comes to need is taken, and never much at once
        self.cache = Memory(4 * math.prod(self.shape), large_pages=False)
        self.uniforms = request_uniforms(request, n)
        self.n_stops, self.stops = len(stop_ids), Table(len(stop_ids))
        for i, token in enumerate(stop_ids):
            self.stops[i] = token
        self.biases = Table(2 * len(sampling.logit_bias))
        for i, (token, amount) in enumerate(sampling.logit_bias):
            self.biases[2 * i] = token
            self.biases.set_float(2 * i + 1, amount)
        self.n_tops = min(request.top_logprobs, config.vocab_size)
        scored = request.logprobs or self.n_tops
        self.logprobs_N2 = torch.zeros(n, 2) if scored else None
        self.tops_NK2 = torch.zeros(n, self.n_tops, 2, dtype=torch.int32)
        self.adjusted_2V = torch.empty(2, config.vocab_size) if sampling.adjusts else None

    @property
    def new(self) -> list[int]:
        """Its new ids."""
        return self.ids[self.prompt : self.size].tolist()

    def logprob(self, i: int) -> float | None:
        """The log-probability of new token `i`, where it was requested."""
        if self.logprobs_N2 is None or not self.request.logprobs:
            return None
        relative, total = self.logprobs_N2[i].tolist()
        return relative - math.log(total)

    def top(self, i: int) -> tuple[tuple[int, float], ...]:
        """The most likely tokens in the place of new token `i`, as many as were requested."""
        if self.logprobs_N2 is None or not self.n_tops:
            return ()
        log_total = math.log(self.logprobs_N2[i, 1].item())
        ids_K, bits_K = self.tops_NK2[i].unbind(-1)
        relative_K = bits_K.contiguous().view(torch.float32).tolist()
        return tuple(
            (token, relative - log_total)
            for token, relative in zip(ids_K.tolist(), relative_K, strict=True)
        )

    def resume(self, new: Sequence[int], read: int) -> None:
        """Go on behind these new tokens, `read` of all tokens being in the cache."""
        self.size = self.prompt + len(new)
        self.ids[self.prompt : self.size] = torch.tensor(new, dtype=torch.int32)
        self.read = read

    def take_cache(self, layer: int, keys_KTE: Tensor, values_KTE: Tensor) -> None:
        """Fill one layer's cache with the positions that another engine has read."""
        cache = self.cache.tensor(0, self.shape, torch.float32)[layer]
        lanes = self.shape[-1]
        for to, source in zip(cache, (keys_KTE, values_KTE), strict=True):
            n = source.shape[1]
            whole = n // lanes
            blocks = source[:, : whole * lanes].unflatten(1, (whole, lanes))
            to[:, :whole].copy_(blocks.transpose(2, 3))
            if n % lanes:
                to[:, whole, :, : n % lanes].copy_(source[:, whole * lanes :].transpose(1, 2))
