"""One model in one dtype, written on by every contestant in each round.

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
from onelaunch.bench.core.record import Say
from onelaunch.bench.core.rounds import Samples, in_rounds
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
"""Who, and with how many threads."""
Heard = Callable[[int], None]
"""What gets each token as it is drawn."""
Writer = Callable[[int, Heard], None]
"""Writes so many tokens."""


def prompt_of(length: int) -> list[int]:
    """A prompt that every contestant can be given, of at least three ids."""
    return [BOS, SPACE, *(LETTERS[7 * i % len(LETTERS)] for i in range(length - 2))]


def bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Weights that one token's forward reads."""
    return make_plan(config, sample=True, weight_itemsize=itemsize).totals.weight_bytes


def write_model(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> Path:
    """A llama2.c file of these weights."""
    save(LoadedModel(config, weights), path, "llama2c")
    return path


def written(peer: RunC, prompt: list[int], n: int, say: Say) -> list[int] | None:
    """What run.c writes; None, and a line that says why, where it does not write it all."""
    try:
        return peer.generate(prompt, n, thread_counts()[-1])[1]
    except RunFailed as error:
        say(f"without {error}")
        return None


def run_c(binary: Path, config: ModelConfig, weights: dict[str, Tensor], path: Path) -> RunC:
    """run.c on these weights, written to `path`."""
    write_model(config, weights, path)
    return RunC(binary, path, config.vocab_size, config.max_seq_len)


class Cell:
    """Everything that takes part, made once. `binary` is run.c's program and `python` one that has
    llama.cpp, if they are there."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        threads: Sequence[Threads],
        binary: Path | None,
        folder: Path,
        say: Say,
        python: Path | None = None,
    ) -> None:
        weights = random_weights(config)
        numbers = sorted({self.number(each) for each in threads})
        self.ours = {
            each: ready(
                CpuEngine(config, weights, dtype, None if isinstance(each, str) else each, log=say)
            )
            for each in threads
        }
        placed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        self.reference = ReferenceEngine(config, placed, "cpu", dtype)
        self.bare = BareLoop(config, placed)
        self.peer_numbers = numbers
        self.run_c: RunC | None = None
        self.same_tokens: dict[str, int] = {}
        """How many tokens run.c and llama.cpp write as ours before they part: random weights give
        logits close to each other, and sums in another order part them."""
        self._say = say
        self._python = python
        self._llama_cpp = partial(llama_cpp.llama_cpp, config=config, weights=weights, dtype=dtype)
        self._folder = folder
        if binary is not None:
            self.run_c = run_c(binary, config, weights, folder / "model.bin")

    @staticmethod
    def number(threads: Threads) -> int:
        """How many threads the peers of a setting of ours have: of "auto", every core."""
        return thread_counts()[-1] if isinstance(threads, str) else threads

    def rounds(self, prompt: list[int], n: int, rounds: int) -> dict[Contestant, list[float]]:
        """Tokens a second of each contestant, and GB/s of reading, round by round."""
        ids = self._compare(prompt, n)
        calls: dict[Contestant, Callable[[], float]] = {}
        for each, engine in self.ours.items():
            calls["ours", each] = partial(_rate, partial(_write, engine, prompt), n)
        for number in self.peer_numbers:
            for name, write in (
                (REFERENCE, partial(_write, self.reference, prompt)),
                (BARE, partial(self._bare, prompt)),
            ):
                calls[name, number] = partial(self._in_torch, write, n, number)
            if self.run_c is not None:
                calls[RUN_C, number] = partial(self._run_c, prompt, n, number)
        with ExitStack() as stack:
            for number in self.peer_numbers if self._python is not None else ():
                peer = self._start_llama_cpp(stack, number, prompt, ids)
                if peer is not None:
                    calls[LLAMA_CPP, number] = partial(_llama_cpp_rate, peer, prompt, n)
            runtime = runtime_of(next(iter(self.ours.values())))
            memory = runtime.weights.memory.address, runtime.weights.n_bytes
            for number in self.peer_numbers:
                calls[READ, number] = stack.enter_context(reader(runtime.program, *memory, number))
            names = {" ".join(map(str, key)): key for key in calls}
            by_name = {name: calls[key] for name, key in names.items()}
            found: Samples = in_rounds(by_name, rounds, SETTLE_SECONDS)
        return {key: found[name] for name, key in names.items()}

    def _start_llama_cpp(
        self, stack: ExitStack, threads: int, prompt: list[int], ids: list[int]
    ) -> llama_cpp.LlamaCpp | None:
        """llama.cpp once it has written the text; None, and a line, where it does not."""
        assert self._python is not None
        try:
            peer = stack.enter_context(
                self._llama_cpp(self._python, threads=threads, folder=self._folder)
            )
            theirs = peer.generate(prompt, len(ids))[1]
        except RunFailed as error:
            self._say(f"without {error}")
            return None
        self.same_tokens[LLAMA_CPP] = _alike(ids, theirs)
        return peer

    def _compare(self, prompt: list[int], n: int) -> list[int]:
        """Everybody of ours writes the text once, so that the automatic choice is made; run.c too,
        and where it cannot it does not take part. The text of ours."""
        ids: list[int] = []
        for engine in self.ours.values():
            (ids,) = generate_ids(engine, [prompt], n)
        if self.run_c is None:
            return ids
        theirs = written(self.run_c, prompt, n, self._say)
        if theirs is None:
            self.run_c = None
        else:
            self.same_tokens[RUN_C] = _alike(ids, theirs)
        return ids

    def _bare(self, prompt: list[int], n: int, heard: Heard) -> None:
        self.bare.generate(prompt, n, heard)

    def _in_torch(self, write: Writer, n: int, threads: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return _rate(write, n)
        finally:
            torch.set_num_threads(before)

    def _run_c(self, prompt: list[int], n: int, threads: int) -> float:
        assert self.run_c is not None
        return self.run_c.generate(prompt, n, threads)[0]


def _alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens both texts begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _llama_cpp_rate(peer: llama_cpp.LlamaCpp, prompt: list[int], n: int) -> float:
    return peer.generate(prompt, n)[0]


def _write(engine: Engine, prompt: list[int], n: int, heard: Heard) -> None:
    for event in Decoding(engine, [Prompt("", prompt)], Limits(n)):
        assert event.token is not None
        heard(event.token)


def _rate(write: Writer, n: int) -> float:
    """Tokens a second of every token but the first, as run.c counts them."""
    write(WARM_TOKENS, lambda token: None)
    times: list[float] = []
    write(n, lambda token: times.append(time.perf_counter()))
    return (len(times) - 1) / (times[-1] - times[0])
