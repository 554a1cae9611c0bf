"""generate: tokens a second of the device's engine, compared with what a user could pick instead.
On a GPU: cuda.py. On a CPU:

Greedy, one sequence, random weights of the presets' shapes, a prompt of three tokens. A rate is of
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
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.engines.generate import cell, life
from onelaunch.bench.engines.generate.cell import AUTO, Cell, Contestant, Threads
from onelaunch.bench.engines.generate.views import draw, table
from onelaunch.bench.peers import llama_cpp, run_c
from onelaunch.config import preset

__all__ = ["PEERS", "UNIT", "draw", "run", "table"]

UNIT = "tokens/s"
PEERS = (run_c.NAME, llama_cpp.NAME)
ITEMSIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight, by dtype."""
# run.c counts milliseconds: of the smallest model it must generate many tokens
TOKENS = {"stories260k": 500, "stories15m": 200, "stories110m": 40}
QUICK_TOKENS = {"stories260k": 200, "stories15m": 24, "stories110m": 24}
ROUNDS = 9
QUICK_LARGE_ROUNDS = 3
PROMPT_TOKENS = 3


def run(device: str, quick: bool, log: Log, peers: Mapping[str, Path]) -> Iterator[Row]:
    """Time every case; yields rows, higher is better where the unit is tokens/s."""
    if device.startswith("cuda"):
        from onelaunch.bench.engines.generate import cuda

        yield from cuda.run(device, quick, log)
        return
    binary, python = (peers.get(name) for name in PEERS)
    if binary is not None:
        run_c.check_binary(binary)
    if python is not None:
        llama_cpp.check_python(python)
    else:
        python = llama_cpp.installed_here()
    compiled_program(log)
    threads: list[Threads] = [AUTO] if quick else [*thread_counts(), AUTO]
    for name, n in (QUICK_TOKENS if quick else TOKENS).items():
        rounds = QUICK_LARGE_ROUNDS if quick and name == "stories110m" else ROUNDS
        for dtype in ["float32"] if quick else ITEMSIZES:
            with tempfile.TemporaryDirectory() as folder:
                made = Cell(preset(name), dtype, threads, binary, Path(folder), log, python)
                samples = made.rounds(cell.prompt_of(PROMPT_TOKENS), n, rounds)
            per_token = cell.bytes_per_token(preset(name), ITEMSIZES[dtype])
            for each, engine in made.ours.items():
                row = row_of(f"{name} {dtype}", each, samples, per_token)
                about = engine.describe()
                row.notes |= {
                    "model": name, "dtype": dtype, "tokens": n,
                    "threads_at_the_end": about["threads"], "prefetch": about["prefetch"],
                }  # fmt: skip
                row.notes |= {f"{peer}_same_tokens": k for peer, k in made.same_tokens.items()}
                yield row
            del made, engine
            gc.collect()  # the engines' memory, before the next ones take as much
    yield life.prompt(binary, ROUNDS, log)
    yield life.second_start(3 if quick else ROUNDS)
    yield from life.memory(log)
    if not quick:
        yield from life.busy_core(binary, ROUNDS, log)
        yield from life.cold_start(3, log)


def row_of(
    what: str, threads: Threads, samples: Mapping[Contestant, list[float]], per_token: int
) -> Row:
    """One setting of ours with the peers, and the reading, that use as many threads."""
    number = Cell.number(threads)
    ours, read = samples["ours", threads], samples[cell.READ, number]
    peers = {
        name: values
        for (name, count), values in samples.items()
        if count == number and name not in ("ours", cell.READ)
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
        "ratios": {name: round(ratio(ours, values), 4) for name, values in peers.items()},
    }
    if cell.RUN_C in peers:
        notes["run.c_dtype"] = "float32"
    medians = {name: statistics.median(values) for name, values in peers.items()}
    return Row.of(f"{what}, {suffix}", ours, peers=medians, notes=notes)
