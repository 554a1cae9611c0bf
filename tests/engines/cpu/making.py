"""How these tests make engines and runtimes, and read the compiled program's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.cpu.layout import End
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.runtime import Runtime
from onelaunch.engines.cpu.sequence import CachedSequence
from onelaunch.engines.engine import Request, Sampling
from onelaunch.plan import make_plan


def make_engine(config: ModelConfig, weights: dict[str, Tensor], **options) -> CpuEngine:
    """An engine in its compiled form."""
    engine = CpuEngine(config, weights, **options)
    assert engine.wait(300), engine.failed
    return engine


def make_runtime(
    code: bytes,
    config: ModelConfig,
    weights: dict[str, Tensor],
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Runtime:
    """A runtime with exactly so many threads."""
    program = Program(code)
    packed = PackedWeights(config, weights, dtype, program.lanes, program.tile)
    return Runtime(config, packed, program, make_plan(config, sample=True), threads, False)


def sequence_of(
    runtime: Runtime, ids: Sequence[int], n: int, sampling: Sampling | None = None
) -> CachedSequence:
    """A sequence of a runtime that grows by up to n tokens."""
    request = Request(0, ids, n, sampling or Sampling())
    return CachedSequence(runtime.config, runtime.program.lanes, request, n)


def grow(runtime: Runtime, texts: list[CachedSequence]) -> None:
    """Let texts grow until all have ended."""
    while going := [text for text in texts if text.end == End.NONE]:
        runtime.generate(going)


def logits_of(runtime: Runtime, ids: list[int]) -> Tensor:
    """Logits of every position of one text, (S, V), written over NaN."""
    logits_SV = torch.full((len(ids), runtime.config.vocab_size), float("nan"))
    runtime.forward(torch.tensor(ids), logits_SV, [(0, runtime.n_stages - 1)])
    return logits_SV


def floats_at(address: int, n: int) -> Tensor:
    """A copy of n float32 at an address."""
    return torch.tensor((ctypes.c_float * n).from_address(address)[:])
