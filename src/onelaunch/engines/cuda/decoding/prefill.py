"""Prompts through the forward, in chunks: keys and values of every position, logits of the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import sync
from onelaunch.engines.cuda.blocking import Blocking, default, padded
from onelaunch.engines.cuda.calls import Call
from onelaunch.engines.cuda.decoding import prompt_kernels
from onelaunch.engines.cuda.decoding.chain import bucket
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import BoundForward, Shape, limits_of
from onelaunch.operators.handles import dependent_launch

CHUNK = 512
"""Positions of a prompt that are read at once."""
_SHORTEST = 16
_STORE_ROWS, _STORE_WARPS = 32, 4


class Prompts:
    """Reads prompts in chunks of `chunk` positions, a power of two from 16 on, the last one's
    rounded up to a power of two. Which tiles compute a position depends on the prompt alone.

    A forward is bound, and kept, for each of these lengths, for a prompt's first chunk and for a
    later one: at most twelve for CHUNK, of less than 2,048 positions together. From its second use
    on it is a CUDA graph. The host is ahead of the GPU by one chunk at most.
    """

    def __init__(self, config: ModelConfig, packed: PackedModel, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._config, self._packed = config, packed
        self._forwards: dict[tuple[int, bool], BoundForward] = {}
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph | None] = {}
        device = packed.embedding.device
        self._on_gpu = device.type == "cuda"
        self._place = torch.zeros(4, dtype=torch.int64, device=device)
        self._launched: torch.cuda.Event | None = None  # after the last chunk

    def begin(
        self, prompt_ids: Sequence[int], keys: Tensor, values: Tensor, with_logits: bool
    ) -> Reading:
        """A prompt to be read into a slot's cache, (L, K, context, E) each of keys and values, of
        which the heads are contiguous. Readings may take turns."""
        return Reading(self, prompt_ids, keys, values, with_logits)

    def calls(self, n: int, with_logits: bool) -> list[Any]:
        """Calls of the forwards that no prompt so far has had and one of n tokens has, of which
        each has another kernel."""
        known = len(self._forwards)
        calls: list[Any] = []
        for first in range(0, n, self.chunk):
            self._forward(min(self.chunk, n - first), first > 0)
        for forward in list(self._forwards.values())[known:]:
            each = len(forward.calls[1:-1]) // self._config.n_layers
            calls += forward.calls[: 1 + each]
        return [*calls, *forward.calls[-1:]] if calls and with_logits else calls

    def read(
        self,
        prompt_ids: Sequence[int],
        first: int,
        keys: Tensor,
        values: Tensor,
        with_logits: bool,
    ) -> Tensor:
        """Read the chunk that begins at position `first`, those before it being in the cache.
        Returns the logits of its last position where they are wanted, (1, V), float32, until the
        next chunk is read."""
        ids = prompt_ids[first : first + self.chunk]
        forward = self._forward(len(ids), first > 0)
        length, last = forward.plan.sequence, first + len(ids) - 1
        b = forward.buffers
        # what stands behind a prompt has no effect on it, unless it is not finite
        behind = [ids[-1]] * (length - len(ids))
        self._copy(torch.tensor([*ids, *behind]), b.tokens)
        if b.positions is not None:
            positions = torch.arange(first, first + length, dtype=torch.int32)
            self._copy(positions.clamp_(max=last), b.positions)
            vectors = [keys.stride(0) // keys.shape[3], keys.stride(1) // keys.shape[3]]
            self._copy(torch.tensor([keys.data_ptr(), values.data_ptr(), *vectors]), self._place)
        if with_logits:
            b.of.fill_(len(ids) - 1)
        self._run(forward, with_logits)
        if b.positions is None:
            self._keep(forward, len(ids), keys, values)
        self._wait_for_the_chunk_before()
        return b.logits

    def _copy(self, numbers: Tensor, to: Tensor) -> None:
        """Numbers to the GPU, without waiting: PyTorch keeps the pinned memory until they are
        there."""
        to.copy_(numbers.pin_memory() if self._on_gpu else numbers, non_blocking=True)

    def _keep(self, forward: BoundForward, n: int, keys: Tensor, values: Tensor) -> None:
        """A first chunk's keys and values into the cache."""
        c = self._config
        kept_LNX = forward.buffers.qkv[:, :n, c.q_dim :]
        for cache, columns_LNX in zip((keys, values), kept_LNX.split(c.kv_dim, -1), strict=True):
            heads = columns_LNX.unflatten(-1, (c.n_kv_heads, c.head_dim)).transpose(1, 2)
            cache[:, :, :n].copy_(heads)

    def _run(self, forward: BoundForward, with_logits: bool) -> None:
        """Launched at its first use, captured and replayed from its second."""
        later = forward.buffers.positions is not None
        key = (forward.plan.sequence, later, with_logits)
        if self._on_gpu and key in self._graphs and self._graphs[key] is None:
            self._graphs[key] = forward.captured(with_logits)
        graph = self._graphs.setdefault(key, None)
        if graph is None:
            forward.run(with_logits)
        else:
            graph.replay()

    def _wait_for_the_chunk_before(self) -> None:
        if self._on_gpu:
            before, self._launched = self._launched, torch.cuda.Event()
            self._launched.record()
            if before is not None:
                before.synchronize()

    def _forward(self, n: int, later: bool) -> BoundForward:
        """That of chunks of n tokens."""
        length = min(max(_SHORTEST, bucket(n)), self._config.max_seq_len, self.chunk)
        key = (length, later)
        if key not in self._forwards:
            self._forwards[key] = self._later(length) if later else self._first(length)
        return self._forwards[key]

    def _first(self, length: int) -> BoundForward:
        shape = Shape(1, length, False, torch.float32, keep_qkv=True)
        return BoundForward(self._config, self._packed, shape, {})

    def _later(self, length: int) -> BoundForward:
        """Its attention is over the cache."""
        tile = self._attention_tile(length)
        shape = Shape(1, length, False, torch.float32, own_positions=True)
        forward = BoundForward(self._config, self._packed, shape, {"attention": tile})
        calls: list[Any] = []
        for stage, call in zip(forward.plan.stages, forward.calls, strict=True):
            if stage.kind == "attention":
                assert stage.layer is not None
                calls += self._attention(forward, stage.layer, tile)
            else:
                calls.append(call)
        forward.calls = calls
        return forward

    def _attention_tile(self, length: int) -> Blocking:
        """The forward's, with half as many rows while half of the multiprocessors would be idle."""
        c, limits = self._config, limits_of(self._packed.embedding.device)
        rule = default(c, length, self._packed.embedding.element_size(), limits)
        tile = replace(rule["attention"], chunk=0)
        while tile.rows > 16 and 2 * c.n_heads * length <= limits.multiprocessors * tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        return tile

    def _attention(self, forward: BoundForward, layer: int, tile: Blocking) -> list[Call]:
        c, b, length = self._config, forward.buffers, forward.plan.sequence
        dependent = dependent_launch(self._packed.embedding.device)
        options: dict[str, Any] = {
            "H": c.n_heads, "K": c.n_kv_heads, "E": c.head_dim, "PADDED": padded(c.head_dim),
            "MODE": (sync.DEPENDENT if dependent else sync.AFTER).value,
        }  # fmt: skip
        if dependent:
            options["launch_pdl"] = True
        at = b.positions, self._place, layer, length
        of_attention = {"BM": tile.rows, "BN": tile.columns, "NUM_STAGES": tile.num_stages}
        return [
            Call(
                prompt_kernels.store_kernel,
                c.n_kv_heads * -(-length // _STORE_ROWS),
                (b.qkv, *at),
                options | {"BM": _STORE_ROWS, "num_warps": _STORE_WARPS},
            ),
            Call(
                prompt_kernels.attention_kernel,
                c.n_heads * -(-length // tile.rows),
                (b.qkv, b.attn_out, *at, c.head_dim**-0.5),
                options | of_attention | {"num_warps": tile.warps},
            ),
        ]


class Reading:
    """A prompt that is being read: `step` by `step`, then `logits`."""

    def __init__(
        self,
        prompts: Prompts,
        prompt_ids: Sequence[int],
        keys: Tensor,
        values: Tensor,
        with_logits: bool,
    ) -> None:
        self._prompts, self._ids, self._cache = prompts, prompt_ids, (keys, values)
        self._with_logits, self._first = with_logits, 0
        self._logits: Tensor | None = None

    def step(self) -> bool:
        """Launch what reads one more chunk, if one is left; whether all of them are read now."""
        first, n = self._first, len(self._ids)
        if first < n:
            self._first = min(first + self._prompts.chunk, n)
            last = self._with_logits and self._first == n
            logits = self._prompts.read(self._ids, first, *self._cache, last)
            self._logits = logits if last else None
        return self._first == n

    @property
    def logits(self) -> Tensor:
        """Those of the last position, (1, V), float32: until another chunk is read, of whichever
        prompt."""
        assert self._logits is not None, "no logits were requested, or the prompt is not read"
        return self._logits
