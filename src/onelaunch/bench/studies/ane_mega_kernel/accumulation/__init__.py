"""accumulation: what more micro-steps an update save, and what they cost in learning.

Training through ML Programs waits at every update until the new weights are compiled (staleness 0,
as in the published study); PyTorch, and the engine that `onelaunch train` takes on the device,
compute with the weights themselves and have nothing to wait for. Updates of every length take
turns, and so do PyTorch and the engine. A micro-step's milliseconds are without the wait, as the
study's are; rates are with everything. On a GPU also what an update would have to make again for
the kernels. Then validation losses after equally many tokens (validation.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.studies.ane_mega_kernel.accumulation.kernel_weights import renewals
from onelaunch.bench.studies.ane_mega_kernel.accumulation.validation import learning
from onelaunch.bench.studies.ane_mega_kernel.accumulation.views import draw, findings, table
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    PYTORCH_NAME,
    Driver,
    Update,
    driver,
    pytorch_and_engine,
    rate,
    why_no_programs,
)
from onelaunch.compilation.schedule import throughput

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "ms"
Counts = Mapping[int, int]
"""How many samples are taken, by micro-steps an update; 0: computed from the others."""
Timed = dict[int, list[list[Update]]]
"""The samples that were taken, by micro-steps an update."""
PROGRAMS: tuple[tuple[str, int, Counts], ...] = (
    ("stories260k", 64, {1: 4, 10: 4, 50: 1, 100: 1, 500: 1}),
    ("stories15m", 32, {1: 3, 10: 3, 50: 1, 100: 1, 500: 0}),
)
PYTORCH: tuple[tuple[str, int, Counts], ...] = (
    ("stories260k", 64, {1: 7, 10: 7, 50: 7, 100: 7, 500: 3}),
    ("stories15m", 32, {1: 3, 10: 3, 50: 3, 100: 3, 500: 1}),
)
QUICK_PROGRAMS = (("stories260k", 64, {1: 2, 10: 2, 50: 1, 100: 0}),)
QUICK_PYTORCH = (("stories260k", 64, {1: 3, 10: 3, 50: 3, 100: 3}),)
WARM_MICRO_STEPS = 5
PYTORCH_SAMPLE = 100
"""Micro-steps, or one update of more: samples of about one length, as noise would else be another
for each. Through ML Programs, where a compilation is seconds, a sample is one update."""
BASE = 10
"""Micro-steps an update that speedups are over, as in the study."""


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    if reason := why_no_programs(device):
        log(f"without ML Programs: {reason}")
    else:
        for model, sequence, counts in QUICK_PROGRAMS if quick else PROGRAMS:
            with driver(model, sequence, staleness=0) as programs:
                yield from _rates(model, {"ML Programs": programs}, counts, 1)
    for model, sequence, counts in QUICK_PYTORCH if quick else PYTORCH:
        with pytorch_and_engine(model, sequence, device, log) as trainings:
            yield from _rates(model, trainings, counts, PYTORCH_SAMPLE)
            yield from renewals(model, sequence, trainings[PYTORCH_NAME], log)
    yield from learning(device, quick, log)


def _rates(
    model: str, trainings: Mapping[str, Driver[Any]], counts: Counts, sample: int
) -> Iterator[Row]:
    """Rows of each trainer, by its name, and of each number of micro-steps an update."""
    timed: dict[str, Timed] = {name: {accum: [] for accum in counts} for name in trainings}
    for training in trainings.values():
        training.update(WARM_MICRO_STEPS)
    for number in range(max(counts.values())):
        for accum, count in counts.items():  # in turn, as the machine has better and worse times
            if number < count:
                for name, training in trainings.items():
                    updates = training.updates(accum, max(1, sample // accum))
                    timed[name][accum].append(updates)
    pytorch = timed.get(PYTORCH_NAME)
    for name, training in trainings.items():
        case = f"{name} {model} 1x{training.sequence}"
        for row in _rows(case, timed[name], training.sequence):
            if pytorch and name != PYTORCH_NAME:
                accum = row.notes["accum"]
                over = _speedup(timed[name][accum], pytorch[accum])
                row.notes["over_pytorch"] = round(over, 4)
            yield row


def _rows(case: str, timed: Timed, sequence: int) -> Iterator[Row]:
    for accum, samples in timed.items():
        if samples:
            row = _measured(f"{case}, accum {accum}", accum, samples)
            speedup = _speedup(samples, timed[BASE])
        else:
            row = _computed(f"{case}, accum {accum}", accum, timed)
            base = statistics.median(rate(updates) for updates in timed[BASE])
            speedup = row.notes["micro_steps_per_s"] / base
        row.notes |= {
            "sequence": sequence,
            "tokens_per_s": round(row.notes["micro_steps_per_s"] * sequence, 2),
            "speedup": round(speedup, 4),
            "threads": torch.get_num_threads(),
        }
        yield row


def _speedup(samples: Sequence[Sequence[Update]], base: Sequence[Sequence[Update]]) -> float:
    """The ratio of rates, of samples taken at about the same time, in the median."""
    return statistics.median(rate(a) / rate(b) for a, b in zip(samples, base, strict=False))


def _step(updates: Sequence[Update]) -> float:
    """Seconds of a micro-step, without the wait for a compilation."""
    working = sum(u.seconds - u.stall_seconds for u in updates)
    return working / sum(u.micro_steps for u in updates)


def _measured(case: str, accum: int, samples: Sequence[Sequence[Update]]) -> Row:
    rates = Row.of(case, [rate(updates) for updates in samples])
    stalls = [u.stall_seconds for updates in samples for u in updates]

    def share(part: str) -> float:
        """The share of the time, in the median sample."""
        return statistics.median(
            sum(getattr(u, part) for u in updates) / sum(u.seconds for u in updates)
            for updates in samples
        )

    notes = {
        "accum": accum,
        "updates_timed": len(stalls),
        "micro_steps_per_s": round(rates.ours, 4),
        "rate_spread": [round(v, 4) for v in rates.spread or ()],
        "updates_per_s": round(rates.ours / accum, 5),
        "compile_seconds": round(statistics.median(stalls), 5),
        "compile_share": round(share("stall_seconds"), 5),
        "optimizer_share": round(share("optimizer_seconds"), 5),
        "computed": False,
    }
    return Row.of(case, [1e3 * _step(updates) for updates in samples], notes=notes)


def _computed(case: str, accum: int, timed: Timed) -> Row:
    """Throughput by K / (K step + compile), the micro-step of the longest update that was timed."""
    longest = max(k for k, samples in timed.items() if samples)
    step = statistics.median(_step(updates) for updates in timed[longest])
    every = [u for samples in timed.values() for updates in samples for u in updates]
    compiling = statistics.median(u.stall_seconds for u in every)
    per_s = throughput(accum, compiling, step, 1.0, overlapped=False) if compiling else 1 / step
    notes = {
        "accum": accum,
        "updates_timed": 0,
        "micro_steps_per_s": round(per_s, 4),
        "updates_per_s": round(per_s / accum, 5),
        "compile_seconds": round(compiling, 5),
        "compile_share": round(compiling * per_s / accum, 5),
        "optimizer_share": None,
        "computed": True,
    }
    return Row(case, 1e3 * step, n=0, notes=notes)
