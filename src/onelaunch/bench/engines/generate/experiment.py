"""generate: tokens a second of the CPU engine, compared with what a user could pick instead.

Greedy, one text, random weights of the presets' shapes, a prompt of three tokens. A rate is of
every token but the first, as run.c counts its own. run.c computes in float32, llama.cpp in the
dtype of ours. Each round has every contestant once, and the speed at which the same number of
threads reads the packed weights: the best of 15 passes in that round. Further rows: a prompt read,
a core that something else keeps busy, a second start, memory, and a first start, which compiles.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onelaunch.bench.core.compiled import compiled_program, thread_counts, threads_named
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.engines.generate.cell import (
    AUTO,
    READ,
    RUN_C,
    Cell,
    Contestant,
    Threads,
    bytes_per_token,
    prompt_of,
)
from onelaunch.bench.engines.generate.life import (
    busy_core,
    cold_start,
    memory,
    prompt,
    second_start,
)
from onelaunch.bench.engines.generate.views import draw, table
from onelaunch.bench.peers import llama_cpp
from onelaunch.bench.peers.run_c import NAME, check_binary
from onelaunch.config import preset

__all__ = ["PEERS", "UNIT", "draw", "run", "table"]

UNIT = "tokens/s"
PEERS = (NAME, llama_cpp.NAME)
DTYPES = ("float32", "bfloat16")
# run.c counts milliseconds: of the smallest model it must write many tokens
TOKENS = {"stories260k": 500, "stories15m": 200, "stories110m": 40}
QUICK_TOKENS = {"stories260k": 200, "stories15m": 24, "stories110m": 24}
ROUNDS = 9
QUICK_LARGE_ROUNDS = 3
PROMPT_TOKENS = 3


def run(device: str, quick: bool, say: Say, peers: Mapping[str, Path]) -> Iterator[Row]:
    """Time every case; yields rows, higher is better where the unit is tokens/s."""
    binary = peers.get(NAME)
    if binary is not None:
        check_binary(binary)
    python = peers.get(llama_cpp.NAME)
    if python is not None:
        llama_cpp.check_python(python)
    else:
        python = llama_cpp.installed_here()
    compiled_program(say)
    for name, n in (QUICK_TOKENS if quick else TOKENS).items():
        for dtype in DTYPES[:1] if quick else DTYPES:
            threads: list[Threads] = [AUTO] if quick else [*thread_counts(), AUTO]
            rounds = QUICK_LARGE_ROUNDS if quick and name == "stories110m" else ROUNDS
            yield from _cell(name, dtype, threads, n, rounds, (binary, python), say)
            gc.collect()  # the engines' memory, before the next ones take as much
    yield prompt(binary, ROUNDS, say)
    yield second_start(3 if quick else ROUNDS)
    yield from memory(say)
    if not quick:
        yield from busy_core(binary, ROUNDS, say)
        yield from cold_start(3, say)


def _cell(
    name: str,
    dtype: str,
    threads: list[Threads],
    n: int,
    rounds: int,
    peers: tuple[Path | None, Path | None],
    say: Say,
) -> Iterator[Row]:
    binary, python = peers
    config = preset(name)
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(config, dtype, threads, binary, Path(folder), say, python)
        samples = cell.rounds(prompt_of(PROMPT_TOKENS), n, rounds)
    per_token = bytes_per_token(config, 4 if dtype == "float32" else 2)
    for each in threads:
        row = row_of(f"{name} {dtype}", each, samples, per_token)
        row.notes |= {"model": name, "dtype": dtype, "tokens": n}
        active = cell.ours[each].describe()["threads"]
        row.notes["threads_at_the_end"] = active
        row.notes["prefetch"] = cell.ours[each].describe()["prefetch"]
        for peer, same in cell.same_tokens.items():
            row.notes[f"{peer}_same_tokens"] = same
        yield row


def row_of(
    what: str, threads: Threads, samples: Mapping[Contestant, list[float]], per_token: int
) -> Row:
    """One setting of ours beside the peers, and the reading, that have as many threads."""
    number = Cell.number(threads)
    ours = samples["ours", threads]
    read = samples[READ, number]
    beside = {
        name: values
        for (name, count), values in samples.items()
        if count == number and name not in ("ours", READ)
    }
    gb_s = [per_token * rate / 1e9 for rate in ours]
    suffix = "automatic threads" if threads == AUTO else threads_named(number)
    notes: dict[str, Any] = {
        "threads": threads,
        "peer_threads": number,
        "bytes_per_token": per_token,
        "gb_s": round(statistics.median(gb_s), 3),
        "read_gb_s": round(statistics.median(read), 3),
        "share_of_read": round(ratio(gb_s, read), 4),
        "ratios": {name: round(ratio(ours, values), 4) for name, values in beside.items()},
    }
    if RUN_C in beside:
        notes["run.c_dtype"] = "float32"
    peers = {name: statistics.median(values) for name, values in beside.items()}
    return Row.of(f"{what}, {suffix}", ours, peers=peers, notes=notes)
