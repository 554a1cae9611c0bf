"""What the experiments on the CPU engine share: its program, models with random weights, and a
forward that stays laid out while it is timed in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from onelaunch.bench.core.record import Log
from onelaunch.bench.core.weights import random_weights
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cpu import usable_cores
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.runtime import Runtime
from onelaunch.errors import RunFailed

TINY = ModelConfig(dim=16, n_layers=1, n_heads=1, hidden_dim=16, vocab_size=16, max_seq_len=8)


def ready(engine: CpuEngine) -> CpuEngine:
    """The engine once its compiled form is there. Raises RunFailed where there will be none."""
    if not engine.wait():
        raise RunFailed(f"the CPU engine has no compiled form ({engine.failed})")
    return engine


def runtime_of(engine: CpuEngine) -> Runtime:
    """The compiled form of an engine that is ready."""
    runtime = engine._runtime
    assert runtime is not None
    return runtime


def compiled_program(log: Log, store: Store | None = None) -> Program:
    """The program that serves every model, from the store or compiled now."""
    engine = CpuEngine(TINY, random_weights(TINY), threads=1, log=log, store=store)
    return runtime_of(ready(engine)).program


def thread_counts() -> tuple[int, ...]:
    """One thread, and one for each core that may be used."""
    return (1,) if usable_cores() == 1 else (1, usable_cores())


def threads_named(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def pack(config: ModelConfig, program: Program) -> PackedWeights:
    """Random weights, float32, as the program reads them."""
    return PackedWeights(config, random_weights(config), torch.float32, program.lanes, program.tile)


def while_laid_out(runtime: Runtime, ids_S: Tensor, action: Callable[[], None]) -> Tensor:
    """Do `action` while the runtime's tables describe a forward of these tokens, from position 0,
    so that `runtime.run` can take its stages again and again; the logits that are there then."""
    logits_SV = torch.full((len(ids_S), runtime.config.vocab_size), torch.nan)
    runtime.forward(ids_S, logits_SV, _Instead(action))
    return logits_SV


class _Instead(tuple[tuple[int, int], ...]):
    """In the place of a forward's launches, one action: the tables and the text's cache are there
    only as long as `Runtime.forward` is at its launches."""

    _action: Callable[[], None]

    def __new__(cls, action: Callable[[], None]) -> _Instead:
        made = super().__new__(cls)
        made._action = action
        return made

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self._action()
        return iter(())
