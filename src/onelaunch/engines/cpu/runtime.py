"""A model laid out for the compiled program: its tables and buffers, forwards and sequences."""

from __future__ import annotations

import ctypes
import sys
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.helpers import Helpers
from onelaunch.engines.cpu.layout import (
    DIGITS,
    QUERIES,
    End,
    Governor,
    Group,
    Layer,
    Operation,
    Seq,
    State,
    Status,
    Sync,
    Token,
)
from onelaunch.engines.cpu.pack import Memory, PackedWeights, padded
from onelaunch.engines.cpu.prefetch import NONE, Prefetch
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.sequence import CachedSequence
from onelaunch.engines.cpu.tables import Table
from onelaunch.engines.engine import STEP_SECONDS, Request
from onelaunch.engines.sampling import float32_penalty
from onelaunch.errors import EngineTimeout
from onelaunch.model import rope_tables
from onelaunch.plan import Plan

MAX_TOKENS = 128  # of one forward; a longer prompt is read in several
MAX_SEQUENCES = 64
SPIN = 4000
ITEM_ROWS = 256

Launches = Sequence[tuple[int, int]]
"""Ranges of stages (first, last + 1), each one call."""


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
        self._sequences = Table(MAX_SEQUENCES * Seq.LENGTH)
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
        self._stuck = False
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
            State.SEQUENCES: self._sequences.address,
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
            State.ATTN_OUT: 4 * n * padded(c.q_dim),
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
        """Logits of every position of one sequence, (S, V), or of its last one, (1, V): float32 and
        contiguous, written in place."""
        if self.adapt:
            self._sync[Sync.ACTIVE] = self.threads
        seq = CachedSequence(self.config, self.program.lanes, Request(0, ids_S.tolist(), 0), 0)
        self._need_positions(seq.size)
        self._lay_out([seq])
        vocab = self.config.vocab_size
        self.state[State.LOGITS_ROW] = 4 * vocab
        s = self.state
        skipped = seq.size - len(logits_SV)
        for start in range(0, seq.size, MAX_TOKENS):
            count = min(MAX_TOKENS, seq.size - start)
            first_row = max(0, min(count, skipped - start))  # that has logits
            for i in range(count):
                row = Token.LENGTH * i
                self._tokens[row + Token.ID] = int(seq.ids[start + i])
                self._tokens[row + Token.SEQUENCE] = 0
                self._tokens[row + Token.POSITION] = start + i
                self._tokens[row + Token.LOGITS] = max(-1, i - first_row)
            groups = range(0, count, QUERIES)
            for g, i in enumerate(groups):
                self._groups[Group.LENGTH * g + Group.FIRST] = i
                self._groups[Group.LENGTH * g + Group.COUNT] = min(QUERIES, count - i)
            s[State.N_TOKENS], s[State.N_GROUPS] = count, len(groups)
            s[State.N_ROWS] = count - first_row
            s[State.LOGITS] = logits_SV.data_ptr() + 4 * vocab * max(0, start - skipped)
            for first, last in launches:
                self.run(first, last)

    def _lay_out(self, sequences: Sequence[CachedSequence]) -> None:
        for i, seq in enumerate(sequences):
            at, sampling = Seq.LENGTH * i, seq.sampling
            for index, value in {
                Seq.IDS: seq.ids.data_ptr(),
                Seq.SIZE: seq.size,
                Seq.READ: seq.read,
                Seq.LIMIT: seq.limit,
                Seq.PROMPT: seq.prompt,
                Seq.CACHE: seq.cache.address,
                Seq.BLOCKS: seq.blocks,
                Seq.UNIFORMS: 0 if seq.uniforms is None else seq.uniforms.data_ptr(),
                Seq.END: seq.end,
                Seq.ROW: -1,
                Seq.TOP_K: min(sampling.top_k, self.config.vocab_size),
                Seq.STOPS: seq.stops.address,
                Seq.N_STOPS: seq.n_stops,
                Seq.LOGPROBS: 0 if seq.logprobs_N2 is None else seq.logprobs_N2.data_ptr(),
                Seq.ADJUSTED: 0 if seq.adjusted_2V is None else seq.adjusted_2V.data_ptr(),
                Seq.BIASES: seq.biases.address,
                Seq.N_BIASES: len(sampling.logit_bias),
                Seq.TOPS: seq.tops_NK2.data_ptr(),
                Seq.N_TOPS: seq.n_tops,
            }.items():
                self._sequences[at + index] = value
            temperature = min(sampling.temperature, 3e38)
            self._sequences.set_float(at + Seq.TEMPERATURE, temperature)
            if temperature and not self._sequences[at + Seq.TEMPERATURE]:
                # not greedy, though float32 has no such number
                self._sequences.set_float(at + Seq.TEMPERATURE, 1e-30)
            self._sequences.set_float(at + Seq.TOP_P, sampling.top_p)
            self._sequences.set_float(at + Seq.MIN_P, sampling.min_p)
            penalty = float32_penalty(sampling.repetition_penalty)
            self._sequences.set_float(at + Seq.PENALTY, penalty)
            self._sequences.set_float(at + Seq.FREQUENCY, sampling.frequency_penalty)
            self._sequences.set_float(at + Seq.PRESENCE, sampling.presence_penalty)
        self.state[State.N_SEQUENCES] = len(sequences)

    def generate(
        self,
        sequences: Sequence[CachedSequence],
        launches: Launches | None = None,
        seconds: float = STEP_SECONDS,
    ) -> None:
        """Let up to MAX_SEQUENCES sequences grow: in one call, or in `launches` for each forward.

        Returns where all have ended, one has its first token or ends, or after so many seconds.
        """
        self._need_positions(max(seq.limit for seq in sequences) - 1)
        self._lay_out(sequences)
        self._need_logits(len(sequences), any(not seq.sampling.greedy for seq in sequences))
        self.state[State.NEWS] = 0
        self.state[State.SLICE] = int(1e9 * seconds)
        self._sync[Sync.BUSY] = 1
        try:
            self.helpers.wake()
            if launches is None:
                status = self._call(Operation.GENERATE)
            else:
                status = self._generate_by(launches, seconds)
        finally:
            self._sync[Sync.BUSY] = 0
        for i, seq in enumerate(sequences):
            at = Seq.LENGTH * i
            seq.size, seq.read = self._sequences[at + Seq.SIZE], self._sequences[at + Seq.READ]
            seq.end = End(self._sequences[at + Seq.END])
        self._check(status)

    def _generate_by(self, launches: Launches, seconds: float) -> int:
        began = time.perf_counter()
        while self._call(Operation.ADVANCE):
            for first, last in launches:
                status = self._call(Operation.RUN, first, last)
                if status != Status.OK:
                    return status
            if time.perf_counter() - began > seconds:
                self.state[State.NEWS] = 1
        return Status.OK

    def _need_logits(self, n: int, drawn: bool) -> None:
        """Room for n rows of logits, and for their candidates where any is drawn."""
        s, vocab = self.state, self.config.vocab_size
        row = 4 * padded(vocab)
        if self._logits_memory is None or self._logits_memory.size < n * row:
            self._logits_memory = Memory(n * row)
        s[State.LOGITS], s[State.LOGITS_ROW] = self._logits_memory.address, row
        if drawn:
            each = 16 * (vocab + self.program.lanes) + 8 * DIGITS
            if self._candidates is None or self._candidates.size < n * each:
                self._candidates = Memory(n * each)
            s[State.CANDIDATES] = self._candidates.address

    def _check(self, status: int) -> None:
        if status == Status.TIMEOUT:
            # the late thread may still write into the buffers: they are of no more use
            self._stuck = True
            label = self._labels[self.state[State.STATUS_AT]]
            raise EngineTimeout(
                f"a thread did not finish its part of stage {label} within a minute; "
                "start again, with threads=1"
            )

    @property
    def n_bytes(self) -> int:
        """Packed weights and buffers; sequences come on top of it."""
        return self.weights.n_bytes + self._buffers.size

    @property
    def dtype(self) -> str:
        """That of the weights."""
        return str(self.weights.dtype).removeprefix("torch.")

    @property
    def prefetch_in_use(self) -> str:
        """The prefetch of the number of threads in use."""
        return str(self.prefetch[self.active_threads > 1])

    @property
    def active_threads(self) -> int:
        """Threads at work now; automatic choice changes it while running."""
        return self._sync[Sync.ACTIVE]


def _close(sync: Table, helpers: Helpers) -> None:
    sync[Sync.CLOSING] = 1
    helpers.close()


def _libc(name: str) -> int:
    """The address of a C function of this process."""
    library = ctypes.CDLL(None) if sys.platform != "win32" else None
    function = getattr(library, name)
    return ctypes.cast(function, ctypes.c_void_p).value or 0
