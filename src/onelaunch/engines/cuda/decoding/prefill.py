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
TOGETHER, TOGETHER_ROWS = 8, 1024
"""Short prompts that one forward reads, and of how many positions together at most."""
_SHORTEST = 16
_STORE_ROWS, _STORE_WARPS = 32, 4


class Prompts:
    """Reads prompts in chunks of `chunk` positions, a power of two from 16 on, the last one's
    rounded up to a power of two. Which tiles compute a position depends on the prompt alone.

    A forward is bound, and kept, for each of these lengths, for a prompt's first chunk and for a
    later one: at most twelve for CHUNK, of less than 2,048 positions together; and for TOGETHER
    prompts of one chunk each, which take the same tiles. From its second use on it is a CUDA graph.
    The host is ahead of the GPU by one chunk at most.
    """

    def __init__(self, config: ModelConfig, packed: PackedModel, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._config, self._packed = config, packed
        # by length, whether a prompt has begun, and how many there are
        self._forwards: dict[tuple[int, bool, int], BoundForward] = {}
        self._graphs: dict[tuple[int, bool, int, bool], torch.cuda.CUDAGraph | None] = {}
        device = packed.embedding.device
        self._on_gpu = device.type == "cuda"
        self._place = torch.zeros(4, dtype=torch.int64, device=device)
        self._launched = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        # of the last chunk and the one before
        rows = max(chunk, TOGETHER_ROWS)
        self._staged = [
            torch.empty(rows, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)
        ]

    def begin(
        self, prompt_ids: Sequence[int], cache: Tensor, slot: int, with_logits: bool
    ) -> Reading:
        """A prompt to be read into a slot of a cache of keys and values, (2, L, slots, K, context,
        E), of which the heads are contiguous. Readings may take turns."""
        return Reading(self, prompt_ids, cache, slot, with_logits)

    def calls(self, n: int, with_logits: bool, together: bool = False) -> list[Any]:
        """Calls of the forwards that no prompt so far has had and one of n tokens has, of which
        each has another kernel. `together`: also those of more such prompts at once."""
        known = len(self._forwards)
        calls: list[Any] = []
        for first in range(0, n, self.chunk):
            self._forward(min(self.chunk, n - first), first > 0)
        if together and self.at_once(n) > 1:
            self._forward(n, False, self.at_once(n))
        for forward in list(self._forwards.values())[known:]:
            each = len(forward.calls[1:-1]) // self._config.n_layers
            calls += forward.calls[: 1 + each]
        return [*calls, *forward.calls[-1:]] if calls and with_logits else calls

    def read(
        self,
        prompt_ids: Sequence[int],
        first: int,
        cache: Tensor,
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
        self._copy_ids([[*ids, *[ids[-1]] * (length - len(ids))]], b.tokens)
        if b.positions is not None:
            keys, values = cache
            positions = torch.arange(first, first + length, dtype=torch.int32)
            self._copy(positions.clamp_(max=last), b.positions)
            vectors = [keys.stride(0) // keys.shape[3], keys.stride(1) // keys.shape[3]]
            self._copy(torch.tensor([keys.data_ptr(), values.data_ptr(), *vectors]), self._place)
        if with_logits:
            b.of.fill_(len(ids) - 1)
        self._run(forward, with_logits)
        if b.positions is None:
            self._keep(forward, 0, 1, len(ids), cache[:, :, None])
        self._wait_for_the_chunk_before()
        return b.logits

    def at_once(self, n: int) -> int:
        """How many prompts of n tokens one forward can read."""
        length = self._length(n)
        return min(TOGETHER, TOGETHER_ROWS // length) if 0 < n <= self.chunk else 1

    def alike(self, n: int, m: int) -> bool:
        """Whether prompts of n and of m tokens have forwards of the same length."""
        return self._length(n) == self._length(m)

    def read_together(self, readings: Sequence[Reading]) -> None:
        """Read whole prompts by one forward, at most `at_once` of any of them."""
        longest = max(len(each.prompt_ids) for each in readings)
        forward = self._forward(longest, False, self.at_once(longest))
        length, rows = forward.plan.sequence, forward.plan.batch
        ids = [list(each.prompt_ids) for each in readings]
        filled = [each + each[-1:] * (length - len(each)) for each in ids]
        self._copy_ids([*filled, *filled[:1] * (rows - len(filled))], forward.buffers.tokens)
        self._run(forward, False)
        first = 0
        for i, each in enumerate(readings):
            following = readings[i + 1].slot if i + 1 < len(readings) else -1
            if following != each.slot + 1:  # those of neighbouring slots in one copy
                slots = slice(readings[first].slot, each.slot + 1)
                # of shorter ones also what stands behind them, which is written before it is read
                self._keep(forward, first, i + 1 - first, longest, each.cache[:, :, slots])
                first = i + 1
        self._wait_for_the_chunk_before()

    def _copy_ids(self, ids: Sequence[Sequence[int]], to: Tensor) -> None:
        """Token ids to the GPU, without waiting: from memory that the chunk before the last one
        had, which has been read."""
        self._staged.reverse()
        staged = self._staged[0][: len(ids) * len(ids[0])]
        staged.numpy().reshape(len(ids), -1)[:] = ids
        to.copy_(staged, non_blocking=True)

    def _copy(self, numbers: Tensor, to: Tensor) -> None:
        """Numbers to the GPU, without waiting: PyTorch keeps the pinned memory until they are
        there."""
        to.copy_(numbers.pin_memory() if self._on_gpu else numbers, non_blocking=True)

    def _keep(self, forward: BoundForward, first: int, prompts: int, n: int, cache: Tensor) -> None:
        """Keys and values of the first n positions of some of a forward's prompts into their slots
        of the cache."""
        c, length = self._config, forward.plan.sequence
        kept_LNX = forward.buffers.qkv[:, first * length : (first + prompts) * length, c.q_dim :]
        split = kept_LNX.unflatten(-1, (2, c.n_kv_heads, c.head_dim)).unflatten(1, (-1, length))
        cache[..., :n, :].copy_(split[:, :, :n].permute(3, 0, 1, 4, 2, 5))

    def _run(self, forward: BoundForward, with_logits: bool) -> None:
        """Launched at its first use, captured and replayed from its second."""
        later = forward.buffers.positions is not None
        key = (forward.plan.sequence, later, forward.plan.batch, with_logits)
        if self._on_gpu and key in self._graphs and self._graphs[key] is None:
            self._graphs[key] = forward.captured(with_logits)
        graph = self._graphs.setdefault(key, None)
        if graph is None:
            forward.run(with_logits)
        else:
            graph.replay()

    def _wait_for_the_chunk_before(self) -> None:
        if self._on_gpu:
            self._launched.reverse()
            self._launched[0].record()
            self._launched[1].synchronize()  # at once where it has not been recorded

    def _length(self, n: int) -> int:
        """That a chunk of n tokens is rounded up to."""
        return min(max(_SHORTEST, bucket(max(n, 1))), self._config.max_seq_len, self.chunk)

    def _forward(self, n: int, later: bool, prompts: int = 1) -> BoundForward:
        """That of chunks of n tokens."""
        length = self._length(n)
        key = (length, later, prompts)
        if key not in self._forwards:
            self._forwards[key] = self._later(length) if later else self._first(length, prompts)
        return self._forwards[key]

    def _first(self, length: int, prompts: int) -> BoundForward:
        c, packed = self._config, self._packed
        # a position's tiles are those of its prompt alone
        limits, itemsize = limits_of(packed.embedding.device), packed.embedding.element_size()
        tiles = default(c, length, itemsize, limits) if prompts > 1 else {}
        shape = Shape(prompts, length, False, torch.float32, keep_qkv=True)
        return BoundForward(c, packed, shape, tiles)

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
        cache: Tensor,
        slot: int,
        with_logits: bool,
    ) -> None:
        self.prompt_ids, self.cache, self.slot = prompt_ids, cache, slot
        self._prompts, self._with_logits, self._first = prompts, with_logits, 0
        self._logits: Tensor | None = None

    def step(self, others: Sequence[Reading] = ()) -> bool:
        """Launch what reads one more chunk, if one is left, and whatever `others` are that it
        `reads_with`; whether all of its chunks are read now."""
        first, n = self._first, len(self.prompt_ids)
        if others:
            self._prompts.read_together([self, *others])
            for each in (self, *others):
                each._first = len(each.prompt_ids)
        elif first < n:
            self._first = min(first + self._prompts.chunk, n)
            last = self._with_logits and self._first == n
            cache = self.cache[:, :, self.slot]
            logits = self._prompts.read(self.prompt_ids, first, cache, last)
            self._logits = logits if last else None
        return self._first == len(self.prompt_ids)

    def reads_with(self, other: Reading, prompts: int) -> bool:
        """Whether one forward can read so many prompts, this one and `other` among them, without
        their logits. They are of about the same length."""
        fewer, more = sorted((len(self.prompt_ids), len(other.prompt_ids)))
        return (
            not (self._with_logits or self._first or other._first)
            and fewer > 0
            and more <= self._prompts.chunk
            and self._prompts.alike(fewer, more)
            and prompts <= self._prompts.at_once(more)
        )

    @property
    def logits(self) -> Tensor:
        """Those of the last position, (1, V), float32: until another chunk is read, of whichever
        prompt."""
        assert self._logits is not None, "no logits were requested, or the prompt is not read"
        return self._logits
