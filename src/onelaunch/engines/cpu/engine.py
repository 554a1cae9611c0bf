"""The CPU engine: a model in one compiled call, and the reference engine until that is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import (
    check_session,
    check_tokens,
    last_positions,
    logits_dtype,
    not_planned,
)
from onelaunch.engines.cpu import DTYPES, prefetch_choice, program, usable_cores, why_not
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.runtime import MAX_SEQUENCES, Runtime
from onelaunch.engines.cpu.session import CpuSession
from onelaunch.engines.reference import MAX_THREADS, CachedRows, ReferenceEngine
from onelaunch.engines.session import RowSession
from onelaunch.errors import BadInput
from onelaunch.plan import Launch, launches, make_plan, parse_depth

CACHED_SECONDS = 0.5  # what a first call waits for a form that is only to be loaded
WHAT = "the fast form for this processor"


class CpuEngine:
    """Runs a model on the CPU in compiled code; see `Engine`.

    The code is compiled once for each processor, in the background, and kept; until it is there the
    reference engine answers, and hands sequences over in their middle. `dtype` is that of weights,
    float32 or bfloat16; all else is float32. `threads` None means as many as are fastest, measured
    while running. `fusion_depth` is how much one call holds: "auto" (many tokens), "stage",
    "half", a number of layers, or "all" (one forward). `log` gets lines for people. `wait` has
    the constructor wait for the compiled form. `prefetch` is how weights are prefetched: "none",
    "l2:BYTES" or "once:BYTES", so many bytes ahead; "auto" measures what is fastest, once for a
    processor and a shape; None takes ONELAUNCH_PREFETCH, or "auto". Raises BadInput for what cannot
    be had.
    """

    max_batch = MAX_SEQUENCES

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        dtype: str | None = None,
        threads: int | None = None,
        fusion_depth: str | int = "auto",
        log: Callable[[str], None] = lambda line: None,
        store: Store | None = None,
        wait: bool = False,
        prefetch: str | None = None,
    ) -> None:
        if reason := why_not() or not_planned(config):
            raise BadInput(f"engine='cpu': {reason}; use engine='reference'")
        self.config = config
        name = dtype or "float32"
        if name not in DTYPES:
            raise BadInput(f"dtype={name!r}: the CPU engine knows {' and '.join(DTYPES)}")
        self.dtype = getattr(torch, name)
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise BadInput(f"threads={threads}: must be from 1 to {MAX_THREADS}")
        self._threads = threads
        self._prefetch = prefetch_choice.by_hand(prefetch)
        plan = make_plan(config, sample=True, weight_itemsize=self.dtype.itemsize)
        self._plan = plan
        self.fusion_depth: str | int = "auto"
        self._launches: tuple[Launch, ...] | None = None
        if fusion_depth != "auto":
            self.fusion_depth = parse_depth(fusion_depth, config.n_layers)
            self._launches = launches(plan, self.fusion_depth)
        self._weights: dict[str, Tensor] | None = dict(weights)
        self._reference: ReferenceEngine | None = None
        self._runtime: Runtime | None = None
        self._busy = threading.Lock()
        self._torch_threads: int | None = None
        self.failed: str | None = None
        self._store = store = store or Store()
        key = program.key()
        self._cached = store.contains(key)
        self._compilation: Compilation[Runtime] | None = Compilation(
            store, key, program.compiler(), self._prepare, log, WHAT
        )
        if wait:
            self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the compiled form; whether it is there."""
        if self._compilation is not None:
            self._compilation.wait(seconds)
        return self._ready() is not None

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position, (B, S, V), or of each last one, (B, V), float32, on the CPU;
        see `LogitsEngine`."""
        logits_dtype(dtype)
        tokens_BS = check_tokens(self.config, tokens_BS)
        ends = last_positions(tokens_BS, last, lengths)
        with self._busy:
            runtime = self._ready_soon()
            if runtime is None:
                return self._slow().logits(tokens_BS, last=last, lengths=lengths)
            tokens_BS = tokens_BS.cpu()
            B, S = tokens_BS.shape
            if ends is not None:
                logits_BV = torch.empty(B, self.config.vocab_size)
                for ids_S, end, logits_V in zip(tokens_BS, ends, logits_BV, strict=True):
                    runtime.forward(ids_S[: end + 1], logits_V[None], self._ranges(sampled=False))
                return logits_BV
            logits_BSV = torch.empty(B, S, self.config.vocab_size)
            ranges = self._ranges(sampled=False)
            for ids_S, logits_SV in zip(tokens_BS, logits_BSV, strict=True):
                runtime.forward(ids_S, logits_SV, ranges)
            return logits_BSV

    def session(self, max_batch: int = 1, max_len: int | None = None) -> CpuSession:
        """Begin to generate; see `Engine`.

        Up to 64 sequences grow together, and a step writes as many tokens as come in 20 ms. A
        sequence is the same alone and among others, drawn or greedy, with any number of threads, at
        any fusion depth.
        """
        max_len = check_session(max_batch, max_len, self.config)
        max_batch = min(max_batch, MAX_SEQUENCES)

        def begin() -> tuple[RowSession, CachedRows]:
            return self._slow().session_and_rows(max_batch, max_len)

        launches = None if self._launches is None else self._ranges(sampled=True)
        return CpuSession(
            self.config, self._ready_soon, begin, self._busy, launches, max_batch, max_len
        )

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights, threads, prefetch, and which form runs."""
        runtime = self._ready()
        totals = self._plan.totals
        calls = 0 if self._launches is None else len(self._launches)
        return {
            "engine": "cpu" if runtime is not None else "reference",
            "device": "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": totals.weight_bytes if runtime is None else runtime.weights.n_bytes,
            "threads": torch.get_num_threads() if runtime is None else runtime.active_threads,
            "threads_chosen": "automatically" if self._threads is None else "by hand",
            "prefetch": None if runtime is None else runtime.prefetch_in_use,
            "prefetch_chosen": "automatically" if self._prefetch is None else "by hand",
            "fusion_depth": self.fusion_depth,
            "calls": "one for many tokens" if not calls else f"{calls} a forward",
            "compiled": runtime is not None,
        }

    # ---- the two forms

    def _prepare(self, code: bytes) -> Runtime:
        """Load the code, in the compilation's thread, pack the weights, choose how to prefetch."""
        loaded = Program(code)
        weights = self._weights
        assert weights is not None
        packed = PackedWeights(self.config, weights, self.dtype, loaded.lanes, loaded.tile)
        threads = self._threads or min(usable_cores(), MAX_THREADS)
        adapt = self._threads is None
        if self._prefetch is not None:
            prefetch = self._prefetch, self._prefetch
        else:
            prefetch = prefetch_choice.chosen(
                self._store, self.config, packed, loaded, threads, adapt
            )
        return Runtime(self.config, packed, loaded, self._plan, threads, adapt, prefetch)

    def _ready(self, seconds: float = 0.0) -> Runtime | None:
        """The compiled form, if it is there or comes within so many seconds."""
        if self._runtime is None and self._compilation is not None:
            waited = self._compilation
            runtime = waited.wait(seconds) if seconds else waited.poll()
            if runtime is not None:
                self._runtime = runtime
                self._give_cores_back()
                self._compilation = self._reference = self._weights = None
            elif waited.failed is not None:
                self.failed, self._compilation = waited.failed, None
                self._give_cores_back()
        return self._runtime

    def _ready_soon(self) -> Runtime | None:
        """The compiled form, also where it is only to be loaded and comes soon."""
        return self._ready(CACHED_SECONDS if self._cached else 0.0)

    def _slow(self) -> ReferenceEngine:
        """The reference engine, computing with the weights that the compiled form will have."""
        if self._reference is None:
            assert self._weights is not None
            weights = self._weights
            if self.dtype == torch.bfloat16:
                weights = {
                    name: tensor.bfloat16() if tensor.dim() > 1 else tensor
                    for name, tensor in weights.items()
                }
            self._torch_threads = torch.get_num_threads()
            # one core is the compiler's: at a lower priority, with PyTorch on every core, it took
            # 74 s instead of 10
            max_threads = max(1, usable_cores() - (self._compilation is not None))
            threads = min(self._threads or self._torch_threads, max_threads)
            self._reference = ReferenceEngine(self.config, weights, "cpu", "float32", threads)
        return self._reference

    def _give_cores_back(self) -> None:
        """PyTorch's threads are the whole process's: as many as before."""
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
            self._torch_threads = None

    def _ranges(self, sampled: bool) -> list[tuple[int, int]]:
        """The stages of each call of a forward, with the sample stage or without."""
        stages = len(self._plan.stages)
        if self._launches is None:
            ranges = [(0, stages)]
        else:
            ranges = [(launch.first, launch.last) for launch in self._launches]
        if not sampled:
            ranges = [(first, min(last, stages - 1)) for first, last in ranges]
        return [(first, last) for first, last in ranges if first < last]
