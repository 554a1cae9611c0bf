"""A model in the compiled program's hands: its tables and buffers, forwards and texts."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import not_finite
from onelaunch.engines.cpu.helpers import Helpers
from onelaunch.engines.cpu.layout import (
    DIGITS,
    QUERIES,
    Governor,
    Group,
    Layer,
    Operation,
    State,
    Status,
    Sync,
    Text,
    Token,
)
from onelaunch.engines.cpu.pack import Memory, PackedWeights, padded
from onelaunch.engines.cpu.prefetch import NONE, Prefetch
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.tables import Table
from onelaunch.engines.engine import OnEnd, OnToken, Sampling
from onelaunch.errors import EngineTimeout
from onelaunch.model import rope_tables
from onelaunch.plan import Plan

MAX_TOKENS = 128  # of one forward; a longer prompt is read in several
MAX_TEXTS = 16
SPIN = 4000
ITEM_ROWS = 256
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

Launches = Sequence[tuple[int, int]]
"""Ranges of stages (first, last + 1), each one call."""


class CachedText:
    """A text that grows: its ids, its keys and values."""

    def __init__(
        self, runtime: Runtime, index: int, ids: Sequence[int], n: int, uniforms: Tensor | None
    ) -> None:
        config = runtime.config
        self.index = index
        self.prompt = len(ids)
        self.limit = self.prompt + n
        self.ids = torch.zeros(self.limit + 1, dtype=torch.int32)
        self.ids[: self.prompt] = torch.tensor(ids, dtype=torch.int32)
        self.size = self.prompt
        self.read = 0
        lanes = runtime.program.lanes
        self.blocks = -(-self.limit // lanes)
        self.shape = (config.n_layers, 2, config.n_kv_heads, self.blocks, config.head_dim, lanes)
        # in small pages: only what a text comes to need is taken, and never much at once
        self.cache = Memory(4 * math.prod(self.shape), large_pages=False)
        self.uniforms = uniforms

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt : self.size].tolist()

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


class Runtime:
    """Runs one packed model with up to `threads` threads; not from two threads at once.

    `prefetch`: how one thread and how several prefetch weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: PackedWeights,
        program: Program,
        plan: Plan,
        threads: int,
        adapt: bool,
        prefetch: tuple[Prefetch, Prefetch] = (NONE, NONE),
    ) -> None:
        stages = [stage.code for stage in plan.stages]
        self._labels = [stage.label for stage in plan.stages]
        self.config, self.weights, self.program = config, weights, program
        self.threads, self.adapt, self.prefetch = threads, adapt, prefetch
        self.state = Table(State.LENGTH)
        self._sync = Table(Sync.TICKETS + Sync.APART * threads)
        self._governor = Table(Governor.LENGTH)
        self._texts = Table(MAX_TEXTS * Text.LENGTH)
        self._tokens = Table(MAX_TOKENS * Token.LENGTH)
        self._groups = Table(MAX_TOKENS * Group.LENGTH)
        self._stages = Table(2 * len(stages))
        for i, pair in enumerate(stages):
            self._stages[2 * i], self._stages[2 * i + 1] = pair
        self.n_stages = len(stages)
        self._layers = Table(Layer.LENGTH * config.n_layers)
        for i, row in enumerate(weights.tables):
            for j, address in enumerate(row):
                self._layers[Layer.LENGTH * i + j] = address
        self._positions = 0
        self._logits_memory: Memory | None = None
        self._candidates: Memory | None = None
        self._stops = Table(1)
        self._raised: BaseException | None = None
        self._callback = _callback(weakref.ref(self))
        self._stuck = False
        self._on_token: OnToken | None = None
        self._on_end: OnEnd | None = None
        self._describe_model()
        self._make_buffers()
        self._sync[Sync.ACTIVE] = 1 if adapt else threads
        keep = (self.state, self._sync, self._stages)
        self.helpers = Helpers(program, self.state.address, threads - 1, keep)
        weakref.finalize(self, _close, self._sync, self.helpers)
        if adapt:
            self._call(Operation.RESET)

    # ---- tables

    def _describe_model(self) -> None:
        c, s, w = self.config, self.state, self.weights
        for index, value in {
            State.DIM: c.dim,
            State.HEADS: c.n_heads,
            State.KV_HEADS: c.n_kv_heads,
            State.HEAD_DIM: c.head_dim,
            State.HIDDEN: c.hidden_dim,
            State.VOCAB: c.vocab_size,
            State.INTERLEAVED: int(c.rope_layout == "interleaved"),
            State.QK_NORM: int(c.qk_norm),
            State.NARROW: int(w.dtype == torch.bfloat16),
            State.EMBEDDING: w.embedding,
            State.HEAD: w.head,
            State.FINAL_NORM: w.final_norm,
            State.LAYERS: self._layers.address,
            State.STAGES: self._stages.address,
            State.ALL_STAGES: self.n_stages,
            State.TOKENS: self._tokens.address,
            State.GROUPS: self._groups.address,
            State.TEXTS: self._texts.address,
            State.MAX_TOKENS: MAX_TOKENS,
            State.THREADS: self.threads,
            State.ADAPT: int(self.adapt),
            State.SYNC: self._sync.address,
            State.GOVERNOR: self._governor.address,
            State.SPIN: SPIN,
            State.ONE_PREFETCH_TO: self.prefetch[0].to,
            State.ONE_PREFETCH_AHEAD: self.prefetch[0].ahead,
            State.SEVERAL_PREFETCH_TO: self.prefetch[1].to,
            State.SEVERAL_PREFETCH_AHEAD: self.prefetch[1].ahead,
            State.MAX_ROWS: max(ITEM_ROWS, c.head_dim),
            State.OUT_ROW: 4 * padded(max(ITEM_ROWS, c.head_dim) + 2 * self.program.tile),
            State.CLOCK: _libc("clock_gettime"),
            State.SLEEP: _libc("usleep"),
            State.BREATHE: ctypes.cast(self._callback, ctypes.c_void_p).value or 0,
        }.items():
            s[index] = value
        s.set_float(State.EPS, c.norm_eps)

    def _make_buffers(self) -> None:
        c, s = self.config, self.state
        n = MAX_TOKENS
        scores = 4 * QUERIES * padded(c.max_seq_len + 16)
        scratch = padded(64 + 4 * padded(c.dim) + s[State.OUT_ROW] * n + scores, 4096)
        sizes = {
            State.X: 4 * n * padded(c.dim),
            State.NORMED: 4 * n * padded(c.dim),
            State.QUERY: 4 * n * c.q_dim,
            State.MIXED: 4 * n * padded(c.q_dim),
            State.ACTIVATION: 4 * n * padded(c.hidden_dim),
            State.SCRATCH: scratch * self.threads,
        }
        s[State.SCRATCH_SIZE] = scratch
        self._buffers = Memory(sum(padded(size, 4096) for size in sizes.values()))
        at = self._buffers.address
        for index, size in sizes.items():
            s[index] = at
            at += padded(size, 4096)

    def _need_positions(self, n: int) -> None:
        """Rotary tables for n positions at least."""
        if n <= self._positions:
            return
        self._positions = min(self.config.max_seq_len, max(512, 2 * n))
        self._rope = [t.contiguous() for t in rope_tables(self.config, self._positions)]
        self.state[State.COS], self.state[State.SIN] = (t.data_ptr() for t in self._rope)

    # ---- calls

    def _call(self, operation: Operation, a: int = 0, b: int = 0) -> int:
        if self._stuck:
            raise EngineTimeout("a thread of this engine is stuck; make a new one")
        return int(self.program.call(operation, self.state.address, a, b))

    def run(self, first: int, last: int) -> None:
        """Stages first .. last - 1 of the forward that the tables describe."""
        self.helpers.wake()
        self._check(self._call(Operation.RUN, first, last))

    def forward(self, ids_S: Tensor, logits_SV: Tensor, launches: Launches) -> None:
        """Logits of every position of one text, float32 and contiguous, written in place."""
        if self.adapt:
            self._sync[Sync.ACTIVE] = self.threads
        text = CachedText(self, 0, ids_S.tolist(), 0, None)
        self._need_positions(text.size)
        self._lay_out([text])
        vocab = self.config.vocab_size
        self.state[State.LOGITS_ROW] = 4 * vocab
        s = self.state
        for start in range(0, text.size, MAX_TOKENS):
            count = min(MAX_TOKENS, text.size - start)
            for i in range(count):
                row = Token.LENGTH * i
                self._tokens[row + Token.ID] = int(text.ids[start + i])
                self._tokens[row + Token.TEXT] = 0
                self._tokens[row + Token.POSITION] = start + i
                self._tokens[row + Token.LOGITS] = i
            groups = range(0, count, QUERIES)
            for g, i in enumerate(groups):
                self._groups[Group.LENGTH * g + Group.FIRST] = i
                self._groups[Group.LENGTH * g + Group.COUNT] = min(QUERIES, count - i)
            s[State.N_TOKENS], s[State.N_GROUPS], s[State.N_ROWS] = count, len(groups), count
            s[State.LOGITS] = logits_SV.data_ptr() + 4 * vocab * start
            for first, last in launches:
                self.run(first, last)

    def _lay_out(self, texts: Sequence[CachedText]) -> None:
        for i, text in enumerate(texts):
            at = Text.LENGTH * i
            for index, value in {
                Text.IDS: text.ids.data_ptr(),
                Text.SIZE: text.size,
                Text.READ: text.read,
                Text.LIMIT: text.limit,
                Text.PROMPT: text.prompt,
                Text.CACHE: text.cache.address,
                Text.BLOCKS: text.blocks,
                Text.UNIFORMS: 0 if text.uniforms is None else text.uniforms.data_ptr(),
                Text.DONE: int(text.size >= text.limit),
                Text.INDEX: text.index,
                Text.ROW: -1,
            }.items():
                self._texts[at + index] = value
        self.state[State.N_TEXTS] = len(texts)

    def generate(
        self,
        texts: Sequence[CachedText],
        sampling: Sampling,
        stop: Sequence[int],
        on_token: OnToken | None = None,
        on_end: OnEnd | None = None,
        launches: Launches | None = None,
    ) -> None:
        """Let texts grow until each is done: in one call, or in `launches` for each forward."""
        if not texts:
            return
        self._need_positions(max(text.limit for text in texts) - 1)
        self._lay_out(texts)
        self._prepare_sampling(len(texts), sampling, stop)
        s = self.state
        self._on_token, self._on_end, self._raised = on_token, on_end, None
        s[State.ON_TOKEN] = s[State.BREATHE] if on_token or on_end else 0
        self._sync[Sync.BUSY] = 1
        try:
            self.helpers.wake()
            with self._catching():
                if launches is None:
                    status = self._call(Operation.GENERATE)
                else:
                    status = self._generate_by(launches)
        finally:
            self._sync[Sync.BUSY] = 0
            self._on_token = self._on_end = None
        for i, text in enumerate(texts):
            text.size = self._texts[Text.LENGTH * i + Text.SIZE]
        if self._raised is not None:
            raise self._raised
        self._check(status)

    def _generate_by(self, launches: Launches) -> int:
        while (n := self._call(Operation.ADVANCE)) > 0:
            for first, last in launches:
                status = self._call(Operation.RUN, first, last)
                if status != Status.OK:
                    return status
        return -n

    def _prepare_sampling(self, n: int, sampling: Sampling, stop: Sequence[int]) -> None:
        s, vocab = self.state, self.config.vocab_size
        s.set_float(State.TEMPERATURE, min(sampling.temperature, 3e38))
        if sampling.temperature and not s[State.TEMPERATURE]:
            s.set_float(State.TEMPERATURE, 1e-30)  # not greedy, though float32 has no such number
        s[State.TOP_K] = min(sampling.top_k, vocab)
        s.set_float(State.TOP_P, sampling.top_p)
        s.set_float(State.MIN_P, sampling.min_p)
        self._stops = Table(len(stop))
        for i, token in enumerate(stop):
            self._stops[i] = token
        s[State.STOPS], s[State.N_STOPS] = self._stops.address, len(stop)
        row = 4 * padded(vocab)
        if self._logits_memory is None or self._logits_memory.size < n * row:
            self._logits_memory = Memory(n * row)
        s[State.LOGITS], s[State.LOGITS_ROW] = self._logits_memory.address, row
        if not sampling.greedy:
            each = 16 * (vocab + self.program.lanes) + 8 * DIGITS
            if self._candidates is None or self._candidates.size < n * each:
                self._candidates = Memory(n * each)
            s[State.CANDIDATES] = self._candidates.address

    def _heard(self, text: int, token: int) -> int:
        """Called from the program; an exception must not pass through it."""
        if self._raised is not None:
            return 1
        try:
            if text >= 0 and token < 0:
                if self._on_end is not None:
                    self._on_end(text)
            elif text >= 0 and self._on_token is not None:
                self._on_token(text, token)
        except BaseException as error:
            self._raised = error
            return 1
        return 0

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Keep what a signal handler raises as `_heard` is entered, before its `try`: ctypes would
        print that and go on, and an interrupt would be lost."""
        caller, before = threading.get_ident(), sys.unraisablehook

        def hook(unraisable: sys.UnraisableHookArgs, /) -> None:
            ours = "ctypes callback" in (unraisable.err_msg or "")
            if ours and threading.get_ident() == caller and unraisable.exc_value is not None:
                self._raised = unraisable.exc_value
            else:
                before(unraisable)

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = before

    def _check(self, status: int) -> None:
        at = self.state[State.STATUS_AT]
        if status == Status.NOT_FINITE:
            raise not_finite(at, str(self.weights.dtype).removeprefix("torch."))
        if status == Status.TIMEOUT:
            # the late thread may still write into the buffers: they are of no more use
            self._stuck = True
            raise EngineTimeout(
                f"a thread did not finish its part of stage {self._labels[at]} within a minute; "
                "start again, with threads=1"
            )

    @property
    def n_bytes(self) -> int:
        """Packed weights and buffers; texts come on top of it."""
        return self.weights.n_bytes + self._buffers.size

    @property
    def prefetch_in_use(self) -> str:
        """How as many threads as work now prefetch weights."""
        return str(self.prefetch[self.active_threads > 1])

    @property
    def active_threads(self) -> int:
        """Threads at work now; automatic choice changes it while running."""
        return self._sync[Sync.ACTIVE]


def _callback(runtime: weakref.ref[Runtime]) -> Any:
    """What the program calls. It holds the runtime weakly: packed weights go with their engine."""

    def heard(text: int, token: int) -> int:
        found = runtime()
        return 1 if found is None else found._heard(text, token)

    return _CALLBACK(heard)


def _close(sync: Table, helpers: Helpers) -> None:
    sync[Sync.CLOSING] = 1
    helpers.close()


def _libc(name: str) -> int:
    """The address of a C function of this process."""
    library = ctypes.CDLL(None) if sys.platform != "win32" else None
    function = getattr(library, name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0
