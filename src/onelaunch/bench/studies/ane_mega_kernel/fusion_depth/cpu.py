"""fusion-depth on the CPU engine.

A sample is the median of some forwards in a row; all ways are sampled in every round. Times are
those of `Runtime.run`, Python's part included; laying out the tokens, once a forward at any depth,
is not. The tokens stand at the positions from 0 on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from onelaunch.bench.core.compiled import (
    compiled_program,
    pack,
    thread_counts,
    threads_named,
    while_laid_out,
)
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import Samples, in_rounds
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cases
from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.cpu.runtime import Runtime
from onelaunch.errors import RunFailed
from onelaunch.plan import every_depth, make_plan, part_of

MODELS = ("stories260k", "stories15m", "stories110m")
QUICK_MODELS = MODELS[:2]
TOKENS = (1, 64)
COMPILATION = "compilation"

ROUNDS, QUICK_ROUNDS = 15, 9
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.1, 0.02
MOST_FORWARDS = 1000


def run_all(quick: bool, log: Log) -> Iterator[Row]:
    """Time every case."""
    if not quick:
        yield compilation(log)
    program = compiled_program(log)
    for ffn in cases.QUICK_FFNS if quick else cases.FFNS:
        plan = part_of(make_plan(ffn.config), "ffn")
        case = cases.Case(
            ffn.case, ffn.name, ffn.tokens, cases.block_ways(ffn.stages), less=(cases.ONE_LAYER,)
        )
        case.reset = [(0, 1)]  # embed: without it the residual stream would stay all zeros
        weights = pack(ffn.config, program)
        for threads in thread_counts():
            runtime = Runtime(ffn.config, weights, program, plan, threads, False)
            yield from _rows(case, runtime, quick)
    for name in QUICK_MODELS if quick else MODELS:
        config = preset(name)
        weights = pack(config, program)
        ways = cases.model_ways(config, every_depth(config.n_layers))
        for threads in thread_counts():
            runtime = Runtime(config, weights, program, make_plan(config), threads, False)
            for tokens in TOKENS:
                case = cases.Case(f"{name} forward 1x{tokens}", name, tokens, ways)
                yield from _rows(case, runtime, quick)


def compilation(log: Log) -> Row:
    """The time of compiling the program, for any model and depth, the store being empty."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        compiled_program(log, Store(Path(folder) / "store"))
        seconds = time.perf_counter() - began
    notes = {"unit": "s", "what": "from nothing to ready, in a process of low priority"}
    return Row(COMPILATION, seconds, notes=notes)


def _rows(case: cases.Case, runtime: Runtime, quick: bool) -> Iterator[Row]:
    """Time all ways in rounds, while the forward of one sequence is laid out."""
    generator = torch.Generator().manual_seed(case.tokens)
    ids = torch.randint(runtime.config.vocab_size, (case.tokens,), generator=generator)
    seconds = QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS
    samples: Samples = {}

    def measure() -> None:
        for ranges in case.ways.values():  # warm
            _forwards(runtime, case.reset, ranges, 2)
        estimate = _forwards(runtime, case.reset, case.ways["all"], 3) / 1e6
        count = max(1, min(MOST_FORWARDS, round(seconds / estimate)))
        contestants = {
            name: partial(_forwards, runtime, case.reset, ranges, count)
            for name, ranges in case.ways.items()
        }
        samples.update(in_rounds(contestants, QUICK_ROUNDS if quick else ROUNDS))

    logits = while_laid_out(runtime, ids, measure)
    if not case.reset and not logits.isfinite().all():
        raise RunFailed(f"{case.name}: a forward by calls left logits unwritten")
    how = cases.How(threads_named(runtime.threads), {"threads": runtime.threads})
    yield from cases.rows_of(case, samples, how)


def _forwards(runtime: Runtime, reset: cases.Ranges, ranges: cases.Ranges, count: int) -> float:
    """The median of so many forwards' microseconds."""
    run_stages, clock = runtime.run, time.perf_counter
    times = []
    for _ in range(count):
        for first, last in reset:
            run_stages(first, last)
        start = clock()
        for first, last in ranges:
            run_stages(first, last)
        times.append(clock() - start)
    return statistics.median(times) * 1e6
