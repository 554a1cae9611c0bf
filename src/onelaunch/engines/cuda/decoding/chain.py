"""The kernels of one token of up to MAX_ROWS sequences, bound to a session's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import sync
from onelaunch.engines.cuda.blocking import padded
from onelaunch.engines.cuda.calls import Call
from onelaunch.engines.cuda.decoding import STOP_IDS, kernels, sampling
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import BoundForward, Shape, limits_of
from onelaunch.operators.handles import dependent_launch

MAX_ROWS = 64
ROWS = 8
"""Rows of a CTA at most."""
WARPS = 4
WIDTH, MERGED_WIDTH = 2048, 512
"""Of the inner dimension at once, at most; where chunks of attention are merged, whose indices take
registers, less."""
WEIGHTS_PER_THREAD, MERGED_PER_THREAD = 64, 16
"""Of those loaded before a launch waits: half as many registers in bfloat16."""
CHUNK_NUMBERS, ATTENTION_WARPS = 16384, 8
"""Numbers of keys in one CTA of attention: what its threads hold before the launch waits."""
HEAD_WARPS, HEAD_CTAS = 8, 2
"""Of a CTA of head, and how many of those a multiprocessor has."""
SAMPLE_BLOCK = 32768
"""Logits that the CTA of a row holds at once."""


@dataclass(frozen=True)
class Memory:
    """A session's tensors on the device; S slots, the last of them for rows that are not used.

    The buffers between stages are for up to ROWS rows: for more, the forward has its own.

    cache: keys and values, (2, L, S, K, context, E); x: (B, D); qkv: (B, N), acc: (B, H, C, E
    padded), m_l: (B, H, C, 2), logits: (B, V), float32; hidden: (B, F); slots: (B,), positions:
    (S,), whole: (S, 8), stop: (S, 32), int32; fraction: (S, 4), uniforms: (S, context), float32.
    tokens, logprobs: (S, context), and progress: (S, 2) are on the host, pinned.
    """

    cache: Tensor
    x: Tensor
    qkv: Tensor
    acc: Tensor
    m_l: Tensor
    hidden: Tensor
    logits: Tensor
    slots: Tensor
    positions: Tensor
    whole: Tensor
    fraction: Tensor
    stop: Tensor
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor
    progress: Tensor

    @classmethod
    def of(cls, config: ModelConfig, packed: PackedModel, max_batch: int, max_len: int) -> Memory:
        """For `max_batch` sequences of `max_len` positions, zeros."""
        c, device, dtype = config, packed.embedding.device, packed.embedding.dtype
        rows, slots = bucket(max_batch), max_batch + 1
        own = rows if max_batch <= ROWS else 1  # more rows have the forward's buffers
        chunks = -(-max_len // chunk_of(c))
        pinned = device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        def on_host(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=pinned)

        cache = (c.n_layers, slots, c.n_kv_heads, max_len, c.head_dim)
        whole = zeros(slots, sampling.WHOLE_NUMBERS, dtype=torch.int32)
        whole[:, sampling.FINISH] = sampling.STOPPED
        return cls(
            cache=zeros(2, *cache, dtype=dtype),
            x=zeros(own, c.dim, dtype=dtype),
            qkv=zeros(own, c.q_dim + 2 * c.kv_dim),
            acc=zeros(rows, c.n_heads, chunks, padded(c.head_dim)),
            m_l=zeros(rows, c.n_heads, chunks, 2),
            hidden=zeros(own, c.hidden_dim, dtype=dtype),
            logits=zeros(own, c.vocab_size),
            slots=torch.full((rows,), max_batch, dtype=torch.int32, device=device),
            positions=zeros(slots, dtype=torch.int32),
            whole=whole,
            fraction=zeros(slots, sampling.FRACTIONS),
            stop=torch.full(
                (slots, STOP_IDS), -1, dtype=torch.int32, device=device
            ),
            uniforms=zeros(slots, max_len),
            tokens=on_host(slots, max_len),
            logprobs=on_host(slots, max_len, dtype=torch.float32),
            progress=on_host(slots, 2),
        )  # fmt: skip

    @property
    def keys(self) -> Tensor:
        """(L, S, K, context, E)."""
        return self.cache[0]

    @property
    def values(self) -> Tensor:
        """(L, S, K, context, E)."""
        return self.cache[1]

    @property
    def n_bytes(self) -> int:
        """Of all of it."""
        return sum(tensor.nbytes for tensor in vars(self).values())


def bucket(rows: int) -> int:
    """As many rows as a chain has for so many sequences: the next power of two."""
    return 1 << (rows - 1).bit_length()


def chunk_of(config: ModelConfig) -> int:
    """Positions of the context in one CTA of attention."""
    return CHUNK_NUMBERS // padded(config.head_dim)


def tile_rows(n_rows: int, width: int, multiprocessors: int, held: int) -> int:
    """How many rows of a weight a CTA has, `width` of the inner dimension at once: few enough for
    two CTAs a multiprocessor, but 4 at least, and no more than a thread holds."""
    most = max(4, held * 32 * WARPS // width)
    wanted = max(4, bucket(-(-n_rows // (2 * multiprocessors))))
    return min(most, wanted)


class TokenChain:
    """One token of `rows` sequences, whose contexts have up to `context` positions: `calls` in
    order. `seen`, (S, V), int32, has the tokens of each slot so far: without it no sequence has a
    repetition penalty."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        memory: Memory,
        rows: int,
        context: int,
        seen: Tensor | None = None,
    ) -> None:
        self._config, self._packed, self._memory, self._seen = config, packed, memory, seen
        self._rows, self._chunks = rows, -(-context // chunk_of(config))
        self._cta_rows = min(ROWS, rows)
        self._multiprocessors = limits_of(packed.embedding.device).multiprocessors
        self._dependent = dependent_launch(packed.embedding.device)
        self._mode = (sync.DEPENDENT if self._dependent else sync.AFTER).value

    @cached_property
    def calls(self) -> list[Any]:
        """All stages of a token, from the first layer on: x is there."""
        calls: list[Any] = []
        for layer in range(self._config.n_layers):
            calls += self._layer(layer)
        return [*calls, self.head, self.sample]

    @property
    def distinct(self) -> list[Any]:
        """Calls of which each has another kernel."""
        return [*self.calls[:5], *self.calls[-2:]]

    def _call(
        self, kernel: Any, ctas: int, arguments: Sequence[Any], warps: int = WARPS, **constants: Any
    ) -> Call:
        options = {**constants, "MODE": self._mode, "num_warps": warps}
        if self._dependent:
            options["launch_pdl"] = True
        return Call(kernel, ctas, tuple(arguments), options)

    def _product(
        self,
        kernel: Any,
        arguments: Sequence[Any],
        n_rows: int,
        inner: int,
        merged: bool = False,
        **constants: Any,
    ) -> Call:
        most, held = (MERGED_WIDTH, MERGED_PER_THREAD) if merged else (WIDTH, WEIGHTS_PER_THREAD)
        width = min(padded(inner), most)
        BN = tile_rows(n_rows, width, self._multiprocessors, held)
        ctas = -(-n_rows // BN) * (self._rows // self._cta_rows)
        tile = {"BN": BN, "WIDTH": width, "ROWS": self._cta_rows}
        return self._call(kernel, ctas, arguments, **constants, **tile)

    @property
    def _heads(self) -> dict[str, int]:
        c = self._config
        padded_width = padded(c.head_dim)
        return {"H": c.n_heads, "E": c.head_dim, "PADDED": padded_width, "CHUNK": chunk_of(c)}

    def _attention(
        self,
        layer: int,
        qkv: Tensor,
        norms: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Call:
        c, m = self._config, self._memory
        arguments = (
            qkv, norms, cos, sin, m.keys[layer], m.values[layer], m.slots, m.positions, m.acc,
            m.m_l, c.norm_eps, c.head_dim**-0.5, m.keys.shape[3], self._chunks,
        )  # fmt: skip
        ctas = self._rows * c.n_kv_heads * self._chunks
        return self._call(
            kernels.attention_kernel,
            ctas,
            arguments,
            ATTENTION_WARPS,
            K=c.n_kv_heads,
            **self._heads,
        )

    def _layer(self, layer: int) -> list[Call]:
        c, w, m = self._config, self._packed, self._memory
        heads = self._heads
        wide = c.q_dim + 2 * c.kv_dim
        norms = None if w.norms is None else w.norms[layer]
        return [
            self._product(
                kernels.qkv_kernel, (m.x, w.qkv[layer], m.qkv, c.norm_eps), wide, c.dim,
                D=c.dim, N=wide,
            ),
            self._attention(layer, m.qkv, norms, w.cos, w.sin),
            self._product(
                kernels.out_proj_kernel,
                (m.x, m.acc, m.m_l, w.out[layer], m.slots, m.positions, self._chunks),
                c.dim, c.q_dim, merged=True, D=c.dim, **heads,
            ),
            self._product(
                kernels.gate_up_kernel, (m.x, w.gate_up[layer], m.hidden, c.norm_eps),
                c.hidden_dim, c.dim, D=c.dim, F=c.hidden_dim,
            ),
            self._product(
                kernels.add_product_kernel, (m.x, m.hidden, w.down[layer]), c.dim, c.hidden_dim,
                D=c.dim, INNER=c.hidden_dim,
            ),
        ]  # fmt: skip

    @cached_property
    def head(self) -> Call:
        """The logits."""
        c, m = self._config, self._memory
        width = min(padded(c.dim), WIDTH)
        BN = max(HEAD_WARPS, WEIGHTS_PER_THREAD * 32 * HEAD_WARPS // width)
        ctas = min(-(-c.vocab_size // BN), HEAD_CTAS * self._multiprocessors)
        groups = self._rows // self._cta_rows
        return self._call(
            kernels.head_kernel, ctas * groups, (m.x, self._packed.head, m.logits, c.norm_eps),
            HEAD_WARPS, D=c.dim, V=c.vocab_size, BN=BN, WIDTH=width, ROWS=self._cta_rows, CTAS=ctas,
        )  # fmt: skip

    @cached_property
    def sample(self) -> Call:
        """Tokens of the logits."""
        return self._sample(self._memory.logits, None)

    def _sample(self, logits: Tensor, following: tuple[Tensor, Tensor] | None) -> Call:
        c, m = self._config, self._memory
        block = min(padded(c.vocab_size), SAMPLE_BLOCK)
        arguments = (
            logits, m.slots, m.positions, m.whole, m.fraction, m.stop, m.uniforms, m.tokens,
            m.logprobs, m.progress, self._packed.embedding, m.x, following, self._seen,
            m.tokens.shape[1],
        )  # fmt: skip
        return self._call(
            sampling.sample_kernel, self._rows, arguments, min(32, max(4, block // 1024)),
            V=c.vocab_size, D=c.dim, WIDTH=padded(c.dim), BLOCK=block,
        )  # fmt: skip


class ManyRows(TokenChain):
    """The same for more rows than ROWS: products in the forward's tiles, of the same rows at every
    step, so that a sequence's bits do not change as others leave."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        memory: Memory,
        forward: BoundForward,
        context: int,
        seen: Tensor | None = None,
    ) -> None:
        super().__init__(config, packed, memory, len(forward.buffers.tokens), context, seen)
        self._forward = forward

    @staticmethod
    def forward(config: ModelConfig, packed: PackedModel, rows: int) -> BoundForward:
        """Of so many sequences of one position each."""
        shape = Shape(rows, 1, True, torch.float32, own_positions=True)
        return BoundForward(config, packed, shape, {})

    @cached_property
    def calls(self) -> list[Any]:
        """All stages of a token, from the embedding on: tokens and positions are there."""
        m, b = self._memory, self._forward.buffers
        calls: list[Any] = []
        for stage, call in zip(self._forward.plan.stages, self._forward.calls, strict=True):
            if stage.kind != "attention":
                calls.append(call)
                continue
            calls.append(self._attention(stage.layer, b.qkv, None, None, None))
            arguments = (m.acc, m.m_l, b.attn_out, m.slots, m.positions, self._chunks)
            ctas = self._rows * self._config.n_heads
            calls.append(self._call(kernels.merge_kernel, ctas, arguments, 1, **self._heads))
        assert b.positions is not None
        return [*calls, self._sample(b.logits, (b.tokens, b.positions))]

    @property
    def distinct(self) -> list[Any]:
        """Calls of which each has another kernel."""
        return [*self.calls[:7], *self.calls[-2:]]
