"""Rows of `generate` about more than a text's speed: a prompt read, a busy core, starts, memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from onelaunch.bench.core.children import ask
from onelaunch.bench.core.compiled import ready, thread_counts
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.rounds import digest, in_rounds, ratio
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.engines.generate.cell import (
    REFERENCE,
    RUN_C,
    SETTLE_SECONDS,
    prompt_of,
    run_c,
    write_model,
    written,
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
# times as long, and a shorter text says so as well
BUSY_RUN_C_TOKENS = 64
CHILD_SECONDS = 300.0
ALLOWED_BYTES = 64 << 20
"""Beside the packed weights and the cache: buffers, threads, code."""
BUSY_LOOP = "import time\nend = time.time() + 120\nwhile time.time() < end: pass"


@contextmanager
def _model(binary: Path | None) -> Iterator[tuple[CpuEngine, ReferenceEngine, RunC | None]]:
    """The model with automatic threads, the reference engine and run.c with every core."""
    config = preset(MODEL)
    weights = random_weights(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = run_c(binary, config, weights, folder / "model.bin") if binary else None
        before = torch.get_num_threads()
        stack.callback(torch.set_num_threads, before)
        reference = ReferenceEngine(config, weights, "cpu", threads=thread_counts()[-1])
        yield ready(CpuEngine(config, weights)), reference, peer


def prompt(binary: Path | None, rounds: int, say: Say) -> Row:
    """A prompt as long as the context, and one token more. run.c reads a prompt as it writes, one
    token at a time: its rate is that at these positions."""
    ids = prompt_of(PROMPT)
    with _model(binary) as (engine, reference, peer):
        contestants: dict[str, Callable[[], float]] = {
            "ours": partial(_reading_rate, engine, ids),
            REFERENCE: partial(_reading_rate, reference, ids),
        }
        if peer is not None and written(peer, ids, 1, say):
            contestants[RUN_C] = lambda: peer.generate(ids, 1, thread_counts()[-1])[0]
        for warm in (engine, reference):
            _reading_rate(warm, ids)
        samples = in_rounds(contestants, rounds, SETTLE_SECONDS)
    ours = samples.pop("ours")
    row = Row.of(f"{MODEL} float32 prompt of {PROMPT}, automatic threads", ours)
    row.peers = {name: statistics.median(values) for name, values in samples.items()}
    row.notes = {
        "kind": "prompt",
        "threads": "auto",
        "peer_threads": thread_counts()[-1],
        "ratios": {name: round(ratio(ours, values), 4) for name, values in samples.items()},
    }
    return row


def _reading_rate(engine: Engine, ids: list[int]) -> float:
    start = time.perf_counter()
    generate_ids(engine, [ids], 1)
    return len(ids) / (time.perf_counter() - start)


def busy_core(binary: Path | None, rounds: int, say: Say) -> Iterator[Row]:
    """Texts while another process keeps a core busy, and while none does: ours with automatic
    threads, run.c with a thread for each core. A row for each, as each stands against itself."""
    ids = prompt_of(3)
    with _model(binary) as (engine, _, peer):
        writers: dict[str, Callable[[], float]] = {"ours": partial(_writing_rate, engine, ids)}
        if peer is not None and written(peer, ids, BUSY_RUN_C_TOKENS, say):
            writers[RUN_C] = partial(_run_c_rate, peer, ids)
        contestants: dict[str, Callable[[], float]] = {}
        for name, write in writers.items():
            contestants[f"{name} idle"] = write
            contestants[f"{name} busy"] = partial(_beside_a_busy_loop, write)
        samples = in_rounds(contestants, rounds, SETTLE_SECONDS)
    for name in writers:
        idle, busy = samples[f"{name} idle"], samples[f"{name} busy"]
        threads: int | str = "auto" if name == "ours" else thread_counts()[-1]
        row = Row.of(f"{MODEL} float32 {name} beside a busy loop, {threads} threads", busy)
        row.notes = {
            "kind": "busy",
            "who": name,
            "idle": digest(idle),
            "busy_over_idle": round(ratio(busy, idle), 4),
            "least": round(min(busy), 3),
        }
        if name == "ours" and RUN_C in writers:
            row.peers = {RUN_C: statistics.median(samples[f"{RUN_C} busy"])}
        yield row


def _writing_rate(engine: Engine, ids: list[int]) -> float:
    """Texts one after another for WRITING_SECONDS at least."""
    start, written = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < WRITING_SECONDS:
        written += len(generate_ids(engine, [ids], BUSY_TOKENS)[0])
    return written / took


def _run_c_rate(peer: RunC, ids: list[int]) -> float:
    """The same of run.c, whose seconds are those that its own rates tell."""
    seconds, written = 0.0, 0
    while seconds < WRITING_SECONDS:
        seconds += BUSY_RUN_C_TOKENS / peer.generate(ids, BUSY_RUN_C_TOKENS, thread_counts()[-1])[0]
        written += BUSY_RUN_C_TOKENS
    return written / seconds


def _beside_a_busy_loop(write: Callable[[], float]) -> float:
    with busy_loop():
        return write()


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
    """What a fresh process measured. Raises RunFailed where it failed."""
    command = [sys.executable, "-m", "onelaunch.bench.engines.generate.child", what, str(model)]
    return dict(ask(command, child_environment(**environment), CHILD_SECONDS))


@contextmanager
def _model_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        config = preset(MODEL)
        yield write_model(config, random_weights(config), Path(folder) / "model.bin")


def second_start(samples: int) -> Row:
    """From a process's first import until the compiled form is there, found in the store."""
    with _model_file() as model:
        in_child("start", model)  # the files are in the system's memory
        found = [in_child("start", model) for _ in range(samples)]
    row = Row.of(f"{MODEL} second start", [each["seconds"] for each in found])
    row.notes = {"kind": "start", "unit": "s"} | {
        key: digest([each[key] for each in found]) for key in ("import_seconds", "ready_seconds")
    }
    return row


def memory(say: Say) -> Iterator[Row]:
    """Growth of a process's own memory, beside what is allowed; no row where it cannot be told."""
    try:
        with _model_file() as model:
            found = in_child("memory", model)
    except RunFailed as error:
        say(f"without a row on memory: {error}")
        return
    allowed = found["weight_bytes"] + found["cache_bytes"] + ALLOWED_BYTES
    row = Row(f"{MODEL} memory", found["bytes"] / 1e6)
    row.notes = {
        "kind": "memory",
        "unit": "MB",
        "weights_mb": round(found["weight_bytes"] / 1e6, 2),
        "cache_mb": round(found["cache_bytes"] / 1e6, 2),
        "allowed_mb": round(allowed / 1e6, 2),
        "within": found["bytes"] <= allowed,
    }
    yield row


def cold_start(samples: int, say: Say) -> Iterator[Row]:
    """Processes that find no compiled program: the first token, and the swap amid texts. No row
    where that failed, as it does on a machine that leaves a compiler no time."""
    found: list[Mapping[str, float]] = []
    with _model_file() as model:
        for _ in range(samples):
            with tempfile.TemporaryDirectory() as store:
                folder = str(Path(store) / "store")
                try:
                    found.append(in_child("cold", model, ONELAUNCH_CACHE=folder))
                except RunFailed as error:
                    say(f"without a sample of a first start: {error}")
    if not found:
        return
    row = Row.of(f"{MODEL} first start", [each["first_token_seconds"] for each in found])
    row.notes = {"kind": "cold", "unit": "s"} | {
        key: digest([each[key] for each in found]) for key in found[0]
    }
    yield row
