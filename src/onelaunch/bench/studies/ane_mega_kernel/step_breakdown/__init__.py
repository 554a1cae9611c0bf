"""step-breakdown: where a micro-step's time goes, the backward part by part as well.

The published study timed its forward and could only estimate its backward. Here all parts of a
micro-step are timed, and what none of them explains is a row of its own. Through ML Programs: every
kind of operation that their evaluation is made of, conversions at their edges, classifier, norm and
loss, what the host does with gradients, and the optimizer. Nothing is compiled meanwhile: the
programs are kept. Each update is timed with the clocks and without, in turn. The same model's
micro-step through programs of a stage, of half a layer and of all layers says what larger backward
programs bring. With PyTorch, and on the engine that `onelaunch train` takes on the device: the
parts between their own marks, on CUDA by events; on the CPU engine also what its threads did.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from onelaunch.bench.core.record import Log, Row, percentiles
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    ENGINE_NAMES,
    WARM_UPDATES,
    Driver,
    driver,
    engine_driver,
    log_without_engine,
    own_engine,
    pytorch_driver,
    why_no_programs,
)
from onelaunch.bench.studies.ane_mega_kernel.step_breakdown.step_parts import (
    BESIDE,
    EVALUATING,
    OUTSIDE,
    WAITING,
    WHOLE,
    Seconds,
    engine_parts,
    program_parts,
    programs_of,
    pytorch_parts,
)
from onelaunch.bench.studies.ane_mega_kernel.step_breakdown.views import draw, findings, table

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "ms"
CASES = (("stories260k", 64), ("stories15m", 32))
QUICK_CASES = CASES[:1]
DEPTHS = ("stage", "half", "")
"""The last, all layers in a program, is the one that is timed part by part."""
UPDATES, QUICK_UPDATES = 9, 2
K = 5
"""Micro-steps an update, of which one optimizer step is shared."""


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    cases, updates = QUICK_CASES if quick else CASES, QUICK_UPDATES if quick else UPDATES
    if reason := why_no_programs(device):
        log(f"without ML Programs: {reason}")
    else:
        for model, sequence in cases:
            yield from _programs(model, sequence, updates)
    for model, sequence in cases:
        training = pytorch_driver(model, sequence, device)
        with pytorch_parts(training) as update:
            for _ in range(2):
                update(K)
            samples = [update(K) for _ in range(10 * updates)]
        yield from _rows(f"PyTorch {model} 1x{sequence}", samples, {})
        if engine := own_engine(model, device):
            with engine_driver(model, sequence, device) as ours:
                yield from _engine(f"{ENGINE_NAMES[engine]} {model} 1x{sequence}", ours, updates)
        else:
            log_without_engine(device, log)


def _engine(case: str, training: Driver[Any], updates: int) -> Iterator[Row]:
    """The parts, and what threads did where the engine counts that. Updates with marks and without
    take turns."""
    for _ in range(WARM_UPDATES):
        engine_parts(training, K, True)  # a CUDA engine captures other graphs for it
    parts: list[Seconds] = []
    by_kind: list[Seconds] = []
    whole: list[float] = []
    for number in range(10 * updates):
        for marks in (number % 2 == 0, number % 2 == 1):
            seconds, kinds = engine_parts(training, K, marks)
            if marks:
                parts.append(seconds)
                by_kind.append(kinds)
            else:
                whole.append(1e3 * seconds[WHOLE])
    yield from _rows(case, parts, {"without_clocks": round(statistics.median(whole), 4)})
    if by_kind[0]:
        threads = training.engine.describe()["threads"]
        yield from _thread_rows(case, parts, by_kind, threads)


def _thread_rows(
    case: str, parts: Sequence[Seconds], by_kind: Sequence[Seconds], threads: int
) -> Iterator[Row]:
    """A row for every kind of work, of all threads together. Shares are of their whole time."""
    available = [threads * each[WHOLE] for each in parts]
    samples = [
        {**kinds, OUTSIDE: seconds - sum(kinds.values())}
        for kinds, seconds in zip(by_kind, available, strict=True)
    ]
    for kind in samples[0]:
        share = sum(each[kind] for each in samples) / sum(available)
        notes = {"of": case, "kind": kind, "share": round(share, 5), "threads": threads}
        yield Row.of(f"{case}: threads: {kind}", _milliseconds(samples, kind), notes=notes)


def _programs(model: str, sequence: int, updates: int) -> Iterator[Row]:
    """The parts with all layers in a program, and the whole at each depth."""
    by_depth: dict[str, Callable[[int, bool], Seconds]] = {}
    counts: dict[str, int] = {}
    parts: dict[str, list[Seconds]] = {depth: [] for depth in DEPTHS}
    whole: dict[str, list[float]] = {depth: [] for depth in DEPTHS}
    with ExitStack() as stack:
        for depth in DEPTHS:
            training = stack.enter_context(driver(model, sequence, depth=depth, staleness=0))
            training.micro_step(1.0)  # compiles
            training.optimizer.zero_grad()
            by_depth[depth] = stack.enter_context(program_parts(training))
            counts[depth] = programs_of(training)
        for number in range(updates + 1):
            for depth in DEPTHS[::-1] if number % 2 else DEPTHS:
                for clocks in (number % 2 == 0, number % 2 == 1):
                    seconds = by_depth[depth](K, clocks)
                    if number and clocks:  # the first ones are to warm up
                        parts[depth].append(seconds)
                    elif number:
                        whole[depth].append(1e3 * seconds[WHOLE])
    case = f"ML Programs {model} 1x{sequence}"
    without_clocks = round(statistics.median(whole[DEPTHS[-1]]), 4)
    yield from _rows(case, parts[DEPTHS[-1]], {"without_clocks": without_clocks})
    for depth in DEPTHS:
        samples, name = parts[depth], depth or "all layers"
        medians = {"products": [BESIDE], "product_wait": [WAITING]}
        for direction in ("forward", "backward"):
            medians[f"{direction}_programs"] = [f"{direction}: {kind}" for kind in EVALUATING]
        waits = _milliseconds(samples, WAITING)
        notes = {
            "depth": name,
            "programs": counts[depth],
            **{
                note: round(statistics.median(_milliseconds(samples, *of)), 4)
                for note, of in medians.items()
            },
            "product_wait_spread": [round(v, 4) for v in percentiles(waits)],
        }
        yield Row.of(f"{case}, {name} in a program", whole[depth], notes=notes)


def _milliseconds(samples: Sequence[Seconds], *parts: str) -> list[float]:
    """The milliseconds of some parts together, by sample."""
    return [1e3 * sum(each.get(part, 0.0) for part in parts) for each in samples]


def _rows(case: str, samples: Sequence[Seconds], notes: dict[str, Any]) -> Iterator[Row]:
    """A row for every part, and of the whole. Shares are of all samples' time, so that they add
    up."""
    whole = sum(each[WHOLE] for each in samples)
    parts = sorted({name for each in samples for name in each} - {WHOLE, BESIDE})
    for part in [WHOLE, *parts, *([BESIDE] if BESIDE in samples[0] else [])]:
        share = sum(each.get(part, 0.0) for each in samples) / whole
        about = {
            "of": case, "part": part, "share": round(share, 5), "micro_steps": K,
            "threads": torch.get_num_threads(), **(notes if part == WHOLE else {}),
        }  # fmt: skip
        yield Row.of(f"{case}: {part}", _milliseconds(samples, part), notes=about)
