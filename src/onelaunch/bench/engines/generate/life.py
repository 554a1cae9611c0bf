"""Rows of `generate` on more than tokens a second: a prompt read, a busy core, starts, memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.core.children import run_child
from onelaunch.bench.core.compiled import ready, thread_counts
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import digest, in_rounds, ratio
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.engines.generate.cell import (
    REFERENCE,
    RUN_C,
    SETTLE_SECONDS,
    ids_of_run_c,
    prompt_of,
    run_c,
    write_model,
)
from onelaunch.bench.peers.run_c import RunC
from onelaunch.compilation.environment import child_environment
from onelaunch.config import preset
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.engine import Engine
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids

MODEL = "stories15m"
PROMPT = 256
WRITING_SECONDS = 2.0
BUSY_TOKENS = 200
# run.c's threads wait for each other at every product: where one has no core it can take a hundred
# times as long, and a shorter sequence shows it as well
BUSY_RUN_C_TOKENS = 64
CHILD_SECONDS = 300.0
ALLOWED_BYTES = 64 << 20
"""In addition to the packed weights and the cache: buffers, threads, code."""
BUSY_LOOP = "import time\nend = time.time() + 120\nwhile time.time() < end: pass"


@contextmanager
def _model(binary: Path | None) -> Iterator[tuple[CpuEngine, ReferenceEngine, RunC | None]]:
    """The model with automatic threads, the reference engine and run.c with every core."""
    config = preset(MODEL)
    weights = random_weights(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = run_c(binary, config, weights, folder / "model.bin") if binary else None
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        reference = ReferenceEngine(config, weights, "cpu", threads=thread_counts()[-1])
        yield ready(CpuEngine(config, weights)), reference, peer


def prompt(binary: Path | None, rounds: int, log: Log) -> Row:
    """A prompt as long as the context, and one token more. run.c reads a prompt as it writes, one
    token at a time: its rate is that at these positions."""
    ids = prompt_of(PROMPT)

    def rate(engine: Engine) -> float:
        start = time.perf_counter()
        generate_ids(engine, [ids], 1)
        return len(ids) / (time.perf_counter() - start)

    with _model(binary) as (engine, reference, peer):
        contestants: dict[str, Callable[[], float]] = {
            "ours": partial(rate, engine),
            REFERENCE: partial(rate, reference),
        }
        for warm_up in contestants.values():
            warm_up()
        if peer is not None and ids_of_run_c(peer, ids, 1, log):
            contestants[RUN_C] = lambda: peer.generate(ids, 1, thread_counts()[-1])[0]
        samples = in_rounds(contestants, rounds, SETTLE_SECONDS)
    ours = samples.pop("ours")
    return Row.of(
        f"{MODEL} float32 prompt of {PROMPT}, automatic threads",
        ours,
        peers={name: statistics.median(values) for name, values in samples.items()},
        notes={
            "kind": "prompt",
            "threads": "auto",
            "peer_threads": thread_counts()[-1],
            "ratios": {name: round(ratio(ours, values), 4) for name, values in samples.items()},
        },
    )


def busy_core(binary: Path | None, rounds: int, log: Log) -> Iterator[Row]:
    """Tokens a second while another process keeps a core busy, and while none does: ours with
    automatic threads, run.c with a thread for each core. A row for each, as each is compared with
    itself."""
    ids = prompt_of(3)

    def with_busy_loop(rate: Callable[[], float]) -> float:
        with busy_loop():
            return rate()

    with _model(binary) as (engine, _, peer):
        rates: dict[str, Callable[[], float]] = {"ours": partial(_rate, engine, ids)}
        if peer is not None and ids_of_run_c(peer, ids, BUSY_RUN_C_TOKENS, log):
            rates[RUN_C] = partial(_run_c_rate, peer, ids)
        contestants: dict[tuple[str, str], Callable[[], float]] = {}
        for name, rate in rates.items():
            contestants[name, "idle"] = rate
            contestants[name, "busy"] = partial(with_busy_loop, rate)
        samples = in_rounds(contestants, rounds, SETTLE_SECONDS)
    for name in rates:
        idle, busy = samples[name, "idle"], samples[name, "busy"]
        threads: int | str = "auto" if name == "ours" else thread_counts()[-1]
        row = Row.of(f"{MODEL} float32 {name} beside a busy loop, {threads} threads", busy)
        row.notes = {
            "kind": "busy",
            "who": name,
            "idle": digest(idle),
            "busy_over_idle": round(ratio(busy, idle), 4),
            "least": round(min(busy), 3),
        }
        if name == "ours" and RUN_C in rates:
            row.peers = {RUN_C: statistics.median(samples[RUN_C, "busy"])}
        yield row


def _rate(engine: Engine, ids: list[int]) -> float:
    """The rate of sequences one after another, for WRITING_SECONDS at least."""
    start, tokens = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < WRITING_SECONDS:
        tokens += len(generate_ids(engine, [ids], BUSY_TOKENS)[0])
    return tokens / took


def _run_c_rate(peer: RunC, ids: list[int]) -> float:
    """The same of run.c, whose seconds follow from its own rates."""
    seconds, tokens = 0.0, 0
    while seconds < WRITING_SECONDS:
        seconds += BUSY_RUN_C_TOKENS / peer.generate(ids, BUSY_RUN_C_TOKENS, thread_counts()[-1])[0]
        tokens += BUSY_RUN_C_TOKENS
    return tokens / seconds


@contextmanager
def busy_loop() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that does nothing but compute, for as long as the block lasts."""
    child = subprocess.Popen([sys.executable, "-c", BUSY_LOOP])
    try:
        time.sleep(0.2)  # its start, which is no computing
        yield child
    finally:
        child.kill()
        child.wait()


def in_child(what: str, model: Path, **environment: str) -> dict[str, float]:
    """The measurements of a fresh process. Raises RunFailed where it failed."""
    command = [sys.executable, "-m", "onelaunch.bench.engines.generate.child", what, str(model)]
    return dict(run_child(command, child_environment(**environment), CHILD_SECONDS))


@contextmanager
def _model_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        config = preset(MODEL)
        yield write_model(config, random_weights(config), Path(folder) / "model.bin")


def second_start(samples: int) -> Row:
    """Time from a process's first import until the compiled form is there, read from the store."""
    with _model_file() as model:
        in_child("start", model)  # the files are in the system's memory
        starts = [in_child("start", model) for _ in range(samples)]
    return _start_row("second start", "start", starts, "seconds", "import_seconds", "ready_seconds")


def cold_start(samples: int, log: Log) -> Iterator[Row]:
    """Processes without a compiled program: the first token, and the swap between two tokens. No
    row where that failed, as it does on a machine that leaves a compiler no time."""
    starts: list[dict[str, float]] = []
    with _model_file() as model:
        for _ in range(samples):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    store = str(Path(folder) / "store")
                    starts.append(in_child("cold", model, ONELAUNCH_CACHE=store))
                except RunFailed as error:
                    log(f"without a sample of a first start: {error}")
    if starts:
        yield _start_row("first start", "cold", starts, "first_token_seconds", *starts[0])


def _start_row(what: str, kind: str, starts: list[dict[str, float]], key: str, *noted: str) -> Row:
    notes: dict[str, Any] = {"kind": kind, "unit": "s"}
    notes |= {name: digest([each[name] for each in starts]) for name in noted}
    return Row.of(f"{MODEL} {what}", [each[key] for each in starts], notes=notes)


def memory(log: Log) -> Iterator[Row]:
    """Growth of a process's own memory, and what is allowed; no row where it cannot be measured."""
    try:
        with _model_file() as model:
            growth = in_child("memory", model)
    except RunFailed as error:
        log(f"without a row on memory: {error}")
        return
    allowed = growth["weight_bytes"] + growth["cache_bytes"] + ALLOWED_BYTES
    yield Row(
        f"{MODEL} memory",
        growth["bytes"] / 1e6,
        notes={
            "kind": "memory",
            "unit": "MB",
            "weights_mb": round(growth["weight_bytes"] / 1e6, 2),
            "cache_mb": round(growth["cache_bytes"] / 1e6, 2),
            "allowed_mb": round(allowed / 1e6, 2),
            "within": growth["bytes"] <= allowed,
        },
    )
