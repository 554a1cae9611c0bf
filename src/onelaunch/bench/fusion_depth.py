"""fusion-depth: one forward by how much one call of compiled code holds.

Whole models, and stacks of FFN layers alone as the published figures have them (with the norm and
the residual that our gate_up and down stages hold). Every way does the same work: all layers, in
more calls or fewer; only `one layer` is less. A sample is the median of some forwards in a row; all
ways are sampled in every round, and each round has its own least squares of time = a + b calls, so
that b is the price of a call. Times are those of `Runtime.run`, Python's part included; laying out
the tokens, once a forward at any depth, is not. The tokens stand at the positions from 0 on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.compiled import (
    check_device,
    compiled_program,
    pack,
    thread_counts,
    threads_named,
    while_laid_out,
    with_stages,
)
from onelaunch.bench.fusion_depth_views import draw, table
from onelaunch.bench.record import Row
from onelaunch.bench.rounds import Samples, digest, fit, in_rounds, ratio
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.program import Program
from onelaunch.engines.cpu.runtime import MAX_TOKENS, Runtime
from onelaunch.errors import RunFailed
from onelaunch.plan import every_depth, launches, make_plan

__all__ = ["UNIT", "draw", "run", "table"]

UNIT = "us"
MODELS = ("stories260k", "stories15m", "stories110m")
QUICK_MODELS = MODELS[:2]
TOKENS = (1, 64)
FFN_LAYERS = 12
FFN_DEPTHS = (1, 2, 4, FFN_LAYERS)
ONE_LAYER = "one layer"
COMPILATION = "compilation"

ROUNDS, QUICK_ROUNDS = 15, 9
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.1, 0.02
MOST_FORWARDS = 1000

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Ffn:
    """Layers of gate_up and down alone, on so many tokens."""

    dim: int
    hidden: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.dim}/{self.hidden}"

    @property
    def config(self) -> ModelConfig:
        # as little as can be of what is not run
        return ModelConfig(
            dim=self.dim,
            n_layers=FFN_LAYERS,
            n_heads=1,
            head_dim=16,
            hidden_dim=self.hidden,
            vocab_size=64,
            max_seq_len=MAX_TOKENS,
        )


FFNS = (
    Ffn(64, 128, 1),
    Ffn(128, 256, 1),
    Ffn(288, 768, 1),
    Ffn(288, 768, 128),
    Ffn(768, 2048, 1),
)
QUICK_FFNS = (FFNS[0], FFNS[2])


@dataclass
class Case:
    """One forward: by name of the way, the stages of each of its calls. `less` names ways that do
    less than the others; `reset` are calls before each forward, not timed."""

    name: str
    model: str
    tokens: int
    ways: dict[str, Ranges]
    less: tuple[str, ...] = ()
    reset: Ranges = field(default_factory=list)


def run(device: str, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Time every case; yields a row for each way and one for the price of a call."""
    check_device("fusion-depth", device)
    if not quick:
        yield compilation(say)
    program = compiled_program(say)
    for ffn in QUICK_FFNS if quick else FFNS:
        plan = with_stages(make_plan(ffn.config), ("embed", "gate_up", "down"))
        case = Case(
            f"ffn {ffn.name} 1x{ffn.tokens}",
            ffn.name,
            ffn.tokens,
            ffn_ways(),
            less=(ONE_LAYER,),
            reset=[(0, 1)],  # embed: without it the residual stream would stay what it was, zeros
        )
        weights = pack(ffn.config, program)
        for threads in thread_counts():
            runtime = Runtime(ffn.config, weights, program, plan, threads, False)
            yield from _rows(case, runtime, quick, say)
    for name in QUICK_MODELS if quick else MODELS:
        config = preset(name)
        weights = pack(config, program)
        yield from _model(name, config, weights, program, quick, say)


def _model(
    name: str,
    config: ModelConfig,
    weights: PackedWeights,
    program: Program,
    quick: bool,
    say: Callable[[str], None],
) -> Iterator[Row]:
    plan = make_plan(config)
    ways = {
        str(depth): [(each.first, each.last) for each in launches(plan, depth)]
        for depth in every_depth(config.n_layers)
    }
    for threads in thread_counts():
        runtime = Runtime(config, weights, program, plan, threads, False)
        for tokens in TOKENS:
            case = Case(f"{name} forward 1x{tokens}", name, tokens, ways)
            yield from _rows(case, runtime, quick, say)


def ffn_ways() -> dict[str, Ranges]:
    """The calls of FFN_LAYERS layers of two stages, behind embed: one layer, then all of them by
    stages and by layers a call."""
    last = 1 + 2 * FFN_LAYERS
    ways: dict[str, Ranges] = {ONE_LAYER: [(1, 3)], "stage": [(i, i + 1) for i in range(1, last)]}
    for depth in FFN_DEPTHS:
        name = "all" if depth == FFN_LAYERS else str(depth)
        ways[name] = [(i, min(i + 2 * depth, last)) for i in range(1, last, 2 * depth)]
    return ways


def compilation(say: Callable[[str], None]) -> Row:
    """What compiling the program takes, for any model and depth, the store being empty."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        compiled_program(say, Store(Path(folder) / "store"))
        seconds = time.perf_counter() - began
    notes = {"unit": "s", "what": "from nothing to ready, in a process of low priority"}
    return Row(COMPILATION, seconds, notes=notes)


def _rows(case: Case, runtime: Runtime, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    samples = _measure(case, runtime, quick)
    yield from rows_of(case, samples, runtime.threads, say)


def _measure(case: Case, runtime: Runtime, quick: bool) -> Samples:
    """Microseconds of one forward, by way and round."""
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
    return samples


def _forwards(runtime: Runtime, reset: Ranges, ranges: Ranges, count: int) -> float:
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


def rows_of(
    case: Case, samples: Samples, threads: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """A row of each way, and the price of a call from the ways that do the whole work."""
    whole = [name for name in case.ways if name not in case.less]
    calls = {name: len(case.ways[name]) for name in case.ways}
    a_us, b_us = _fits(whole, calls, samples)
    notes: dict[str, Any] = {"model": case.model, "tokens": case.tokens, "threads": threads}
    suffix = threads_named(threads)
    for name, values in samples.items():
        row = Row.of(_case(case, name, suffix), values)
        row.notes = {**notes, "depth": name, "calls": calls[name]}
        if name in whole:
            row.peers = {"stage": statistics.median(samples["stage"])}
            row.notes["speed_against_stage"] = round(ratio(samples["stage"], values), 4)
            row.notes["speed_of_all"] = round(ratio(values, samples["all"]), 4)
        yield row
    price = Row.of(f"{case.name} price of a call, {suffix}", b_us)
    price.notes = {**notes, "price_of_a_call": True, "rest": digest(a_us)}
    price.notes["points"] = sorted({calls[name] for name in whole})
    low, high = price.spread or (price.ours, price.ours)
    say(
        f"{case.name}, {suffix}: {statistics.median(samples['stage']):,.1f} us in "
        f"{calls['stage']} calls, {statistics.median(samples['all']):,.1f} in one; "
        f"a call {price.ours:.2f} us ({low:.2f} to {high:.2f})"
    )
    yield price


def _case(case: Case, way: str, suffix: str) -> str:
    return f"{case.name} {way if way in case.less else f'depth {way}'}, {suffix}"


def _fits(
    whole: Sequence[str], calls: Mapping[str, int], samples: Samples
) -> tuple[list[float], list[float]]:
    """a and b of every round."""
    counts = [calls[name] for name in whole]
    rounds = zip(*(samples[name] for name in whole), strict=True)
    a_us, b_us = zip(*(fit(counts, times) for times in rounds), strict=True)
    return list(a_us), list(b_us)
