"""One model in one dtype: every contestant generates once in each round.

Ours with each number of threads and with the automatic choice; PyTorch's (the reference engine and
a bare loop), run.c and llama.cpp with each number of threads; and reading the packed weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onelaunch.bench.core.compiled import ready, runtime_of, thread_counts
from onelaunch.bench.core.record import Log
from onelaunch.bench.core.rounds import in_rounds
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.engines.generate.reading import reader
from onelaunch.bench.engines.generation_speed import BareLoop
from onelaunch.bench.peers import llama_cpp
from onelaunch.bench.peers.run_c import BOS, LETTERS, SPACE, RunC
from onelaunch.checkpoints import save
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.engine import Engine
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import Decoding, Limits, generate_ids
from onelaunch.generation.prompts import Prompt
from onelaunch.plan import make_plan

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"
REFERENCE, BARE, RUN_C, READ = "reference", "bare loop", "run.c", "read"
LLAMA_CPP = llama_cpp.NAME
SETTLE_SECONDS = 0.03  # threads of the one before go to sleep
WARM_TOKENS = 2

Threads = int | str
Contestant = tuple[str, Threads]
"""Its name, and how many threads it uses."""
OnToken = Callable[[int], None]
"""Gets each token as it is drawn."""
Generate = Callable[[int, OnToken], object]
"""Generates so many tokens."""


def prompt_of(length: int) -> list[int]:
    """A prompt that every contestant accepts, of at least three ids."""
    return [BOS, SPACE, *(LETTERS[7 * i % len(LETTERS)] for i in range(length - 2))]


def bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Weights that one token's forward reads."""
    return make_plan(config, sample=True, weight_itemsize=itemsize).totals.weight_bytes


def write_model(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> Path:
    """A llama2.c file of these weights."""
    save(LoadedModel(config, weights), path, "llama2c")
    return path


def run_c(binary: Path, config: ModelConfig, weights: dict[str, Tensor], path: Path) -> RunC:
    """run.c on these weights, written to `path`."""
    write_model(config, weights, path)
    return RunC(binary, path, config.vocab_size, config.max_seq_len)


def ids_of_run_c(peer: RunC, prompt: list[int], n: int, log: Log) -> list[int] | None:
    """The ids that run.c generates; None, and a line that says why, where it does not generate it
    all."""
    try:
        return peer.generate(prompt, n, thread_counts()[-1])[1]
    except RunFailed as error:
        log(f"without {error}")
        return None


class Cell:
    """All contestants, made once. `binary` is run.c's program and `python` one that has llama.cpp,
    None where there is none. After `rounds`, `same_tokens` says how many tokens run.c and llama.cpp
    generate as ours before they differ: random weights give logits close to each other, and sums in
    another order decide between them."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        threads: Sequence[Threads],
        binary: Path | None,
        folder: Path,
        log: Log,
        python: Path | None = None,
    ) -> None:
        weights = random_weights(config)
        self.ours = {
            each: ready(
                CpuEngine(config, weights, dtype, None if isinstance(each, str) else each, log=log)
            )
            for each in threads
        }
        self.numbers = sorted({self.number(each) for each in threads})
        placed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        self.reference = ReferenceEngine(config, placed, "cpu", dtype)
        self.bare = BareLoop(config, placed)
        self.run_c = run_c(binary, config, weights, folder / "model.bin") if binary else None
        self.llama_cpp = (
            partial(llama_cpp.llama_cpp, python, config, weights, dtype, folder=folder)
            if python
            else None
        )
        self.same_tokens: dict[str, int] = {}
        self._log = log

    @staticmethod
    def number(threads: Threads) -> int:
        """The number of threads that the peers of a setting of ours use: of "auto", every core."""
        return thread_counts()[-1] if isinstance(threads, str) else threads

    def rounds(self, prompt: list[int], n: int, rounds: int) -> dict[Contestant, list[float]]:
        """Tokens a second of each contestant, and GB/s of reading, round by round."""
        calls: dict[Contestant, Callable[[], float]] = {}
        ids: list[int] = []
        for threads, engine in self.ours.items():
            (ids,) = generate_ids(engine, [prompt], n)  # the automatic choice is made
            calls["ours", threads] = partial(_rate, partial(_generate, engine, prompt), n)
        run_c = self.run_c
        if run_c is not None:
            if theirs := ids_of_run_c(run_c, prompt, n, self._log):
                self.same_tokens[RUN_C] = _same(ids, theirs)
            else:
                run_c = None
        runtime = runtime_of(next(iter(self.ours.values())))
        memory = runtime.weights.memory.address, runtime.weights.n_bytes
        in_torch: dict[str, Generate] = {
            REFERENCE: partial(_generate, self.reference, prompt),
            BARE: partial(self.bare.generate, prompt),
        }
        with ExitStack() as stack:
            for number in self.numbers:
                for name, generate in in_torch.items():
                    calls[name, number] = partial(_rate_in_torch, generate, n, number)
                if run_c is not None:
                    calls[RUN_C, number] = partial(_rate_of_peer, run_c.generate, prompt, n, number)
                if (peer := self._start_llama_cpp(stack, number, prompt, ids)) is not None:
                    calls[LLAMA_CPP, number] = partial(_rate_of_peer, peer.generate, prompt, n)
                calls[READ, number] = stack.enter_context(reader(runtime.program, *memory, number))
            return in_rounds(calls, rounds, SETTLE_SECONDS)

    def _start_llama_cpp(
        self, stack: ExitStack, threads: int, prompt: list[int], ids: list[int]
    ) -> llama_cpp.LlamaCpp | None:
        """llama.cpp once it has generated; None, and a line that says why, where it does not."""
        if self.llama_cpp is None:
            return None
        try:
            peer = stack.enter_context(self.llama_cpp(threads=threads))
            self.same_tokens[LLAMA_CPP] = _same(ids, peer.generate(prompt, len(ids))[1])
            return peer
        except RunFailed as error:
            self._log(f"without {error}")
            return None


def _same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of tokens that both sequences begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _generate(engine: Engine, prompt: list[int], n: int, on_token: OnToken) -> None:
    for event in Decoding(engine, [Prompt("", prompt)], Limits(n)):
        assert event.token is not None
        on_token(event.token)


def _rate(generate: Generate, n: int) -> float:
    """Tokens a second of every token but the first, as run.c counts them."""
    generate(WARM_TOKENS, lambda token: None)
    times: list[float] = []
    generate(n, lambda token: times.append(time.perf_counter()))
    return (len(times) - 1) / (times[-1] - times[0])


def _rate_in_torch(generate: Generate, n: int, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _rate(generate, n)
    finally:
        torch.set_num_threads(before)


def _rate_of_peer(generate: Callable[..., tuple[float, list[int]]], *args: object) -> float:
    """The rate of a peer that measures it itself."""
    return generate(*args)[0]
