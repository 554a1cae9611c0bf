"""stack: what the optimizations of a training step bring together, one added to the other.

Training through ML Programs with 10 micro-steps an update and each compilation waited for; with
100; with 100 and compilations in the background; and with none at all, the programs kept. The
published study measured the first two and computed the others. They take turns in rounds, each
beginning with an update that is not timed, in the state that such training is in; before the next
one's turn, compilations have ended. The model's rate is K / (K step + compile) waiting, and
K / max(K step slowdown, compile) in the background. With PyTorch, and on the engine that
`onelaunch train` takes on the device, nothing is compiled: there the last row is without the
optimizer's step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import (
    Finding,
    error_of_ratio,
    of_a_gain,
    without_evaluated_seconds,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import Samples, in_rounds, ratio
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import (
    CASE,
    column,
    median_and_spread,
    over_pytorch,
    published,
    table_of,
)
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    PYTORCH_NAME,
    Driver,
    Update,
    driver,
    median_share,
    pytorch_and_engine,
    rate,
    why_no_programs,
)
from onelaunch.compilation.schedule import throughput
from onelaunch.engines.coreml.training import CoreMLTrainer

UNIT = "micro-steps/s"
CASES = (("stories260k", 64, 4), ("stories15m", 32, 2))
"""Model, tokens, rounds."""
QUICK_CASES = (("stories260k", 64, 1),)
SHORT, LONG, QUICK_LONG = 10, 100, 30
"""Micro-steps an update, the first two as in the study."""
BASELINE_UPDATES = 3
PYTORCH_ROUNDS = 2
"""For each round of programs, as a micro-step is much shorter."""
STAGES = BASELINE, ACCUMULATION, BACKGROUND, ASYMPTOTE = (
    "stack-baseline", "stack-accumulation", "stack-background", "stack-asymptote",
)  # fmt: skip


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    cases, long = (QUICK_CASES, QUICK_LONG) if quick else (CASES, LONG)
    if reason := why_no_programs(device):
        log(f"without ML Programs: {reason}")
    else:
        for model, sequence, rounds in cases:
            yield from _programs(model, sequence, rounds, long)
    for model, sequence, rounds in cases:
        with pytorch_and_engine(model, sequence, device, log) as trainings:
            yield from _without_programs(trainings, model, PYTORCH_ROUNDS * rounds, long)


def _programs(model: str, sequence: int, rounds: int, long: int) -> Iterator[Row]:
    timed: dict[str, list[Update]] = {stage: [] for stage in STAGES}

    def round_of(stage: str, training: Driver[CoreMLTrainer]) -> float:
        """Micro-steps a second."""
        renew = stage != ASYMPTOTE
        if renew:
            training.update(1)  # its end begins what is compiled in the next
        count = BASELINE_UPDATES if stage == BASELINE else 1
        k = SHORT if stage == BASELINE else long
        updates = [training.update(k, renew) for _ in range(count)]
        if stage == BACKGROUND:
            updates = [_with_wait(updates[0], training.engine)]
        training.engine.settle()
        timed[stage] += updates
        return rate(updates)

    with (
        driver(model, sequence, staleness=0) as waiting,
        driver(model, sequence, staleness=1) as background,
    ):
        for each in (waiting, background):
            each.update(2)
            each.engine.settle()
        trainings = {stage: waiting for stage in STAGES} | {BACKGROUND: background}
        samples = in_rounds(
            {stage: partial(round_of, stage, each) for stage, each in trainings.items()}, rounds
        )
        schedule = background.engine.schedule
    step = statistics.median(u.seconds / u.micro_steps for u in timed[ASYMPTOTE])
    stalls = [u.stall_seconds for stage in (BASELINE, ACCUMULATION) for u in timed[stage]]
    compiling = statistics.median(stalls)
    overlapped, slowdown = schedule.compile_seconds or compiling, schedule.slowdown or 1.0
    models = {
        BASELINE: throughput(SHORT, compiling, step, 1.0, overlapped=False),
        ACCUMULATION: throughput(long, compiling, step, 1.0, overlapped=False),
        BACKGROUND: throughput(long, overlapped, step, slowdown, overlapped=True),
        ASYMPTOTE: 1 / step,
    }
    seconds = {BASELINE: compiling, ACCUMULATION: compiling, BACKGROUND: overlapped, ASYMPTOTE: 0.0}
    for stage in STAGES:
        notes = {
            "model": round(models[stage], 4),
            "compile_seconds": round(seconds[stage], 4),
            "step": round(step, 6),
            "slowdown": round(slowdown, 4) if stage == BACKGROUND else 1.0,
            "wait_share": round(median_share(timed[stage]), 5),
        }
        yield _row(f"ML Programs {model} 1x{sequence}", stage, samples, long, notes)


def _with_wait(update: Update, engine: CoreMLTrainer) -> Update:
    """The row with the wait that the next update would begin with: what was compiled during this
    one may not be done."""
    start = time.perf_counter()
    engine.settle(engine.version - engine.staleness)
    wait = time.perf_counter() - start
    stall = update.stall_seconds + wait
    return replace(update, seconds=update.seconds + wait, stall_seconds=stall)


def _without_programs(
    trainings: Mapping[str, Driver[Any]], model: str, rounds: int, long: int
) -> Iterator[Row]:
    """PyTorch's rows and the engine's, whose updates take turns."""

    def with_updates_of(training: Driver[Any], k: int) -> float:
        return rate(training.updates(k, long // k))  # as many micro-steps

    def without_optimizer(training: Driver[Any]) -> float:
        training.wait()
        start = time.perf_counter()
        for _ in range(long):
            training.micro_step(1 / long)
        training.wait()
        seconds = time.perf_counter() - start
        training.optimizer.zero_grad()
        return long / seconds

    contestants: dict[tuple[str, str], Callable[[], float]] = {}
    for name, training in trainings.items():
        training.update(SHORT)
        contestants |= {
            (name, BASELINE): partial(with_updates_of, training, SHORT),
            (name, ACCUMULATION): partial(with_updates_of, training, long),
            (name, ASYMPTOTE): partial(without_optimizer, training),
        }
    samples = in_rounds(contestants, rounds)
    for name, training in trainings.items():
        case = f"{name} {model} 1x{training.sequence}"
        of_case = {stage: values for (whose, stage), values in samples.items() if whose == name}
        for stage, values in of_case.items():
            notes = {}
            if name != PYTORCH_NAME:
                notes["over_pytorch"] = round(ratio(values, samples[PYTORCH_NAME, stage]), 4)
            yield _row(case, stage, of_case, long, notes)


def _row(case: str, stage: str, samples: Samples, long: int, notes: dict[str, Any]) -> Row:
    k = SHORT if stage == BASELINE else long
    more = {BACKGROUND: ", compiled in the background", ASYMPTOTE: ", no overhead at all"}
    about = {
        "of": case,
        "stage": stage,
        "k": k,
        "speedup": round(ratio(samples[stage], samples[BASELINE]), 4),
        "threads": torch.get_num_threads(),
        **notes,
    }
    label = f"{case}: {k} micro-steps an update{more.get(stage, '')}"
    return Row.of(label, samples[stage], notes=about)


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings: of every stage its speedup over the first; of the one in the background, the model
    too."""
    results = []
    first = {row["of"]: row for row in record["rows"] if row["stage"] == BASELINE}
    for row in record["rows"]:
        key = row["stage"]
        theirs = f"{published(key, 'micro-steps/s'):g} micro-steps/s"
        ours = f"{row['ours']:.2f} micro-steps/s"
        if key == BASELINE:
            claim = f"{row['of']}: what the others are over"
            why = "another machine and another model; their ratios follow"
            results.append(Finding((key,), claim, theirs, ours, "not applicable", why))
            continue
        speedup = published(key, "speedup")
        error = error_of_ratio(row["speedup"], row, first[row["of"]])
        verdict, why = of_a_gain(row["speedup"], speedup, error)
        if row["k"] != LONG:
            verdict, why = "quick run", f"{row['k']} micro-steps an update"
        computed = "" if key == ACCUMULATION else ", computed"
        results.append(
            Finding(
                (key,),
                row["case"],
                f"{speedup:g} times the baseline, {theirs}{computed}",
                f"{row['speedup']:.2f} times, {ours}",
                verdict,
                f"{why}; weights are arguments here: only the optimizer's step is shared by more",
                row["speedup"] / speedup,
            )
        )
        if key == BACKGROUND:
            what = "K / max(K step slowdown, compile) says what the background brings"
            claim = f"{row['of']}: {what}"
            by_model = f"{row['ours']:.2f} measured, {row['model']:.2f} by the model"
            theirs = "5.24 by such a model"
            results.append(Finding((key,), claim, theirs, by_model, "not applicable", ""))
    return without_evaluated_seconds(results)


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = [
        table_of(
            record["rows"],
            CASE,
            *median_and_spread("micro-steps/s"),
            column("speedup", "speedup", "{:.2f}"),
            *over_pytorch(record["rows"]),
            column("by the model", "model", digits),
            column("waiting", "wait_share", "{:.1%}"),
            column("compiling, s", "compile_seconds", digits),
            ("study", lambda row: f"{published(row['stage'], 'micro-steps/s'):g}"),
            ("speedup", lambda row: f"{published(row['stage'], 'speedup'):g}"),
        ),
        "Speedups are over the first row of each, round by round. The model: K / (K step + "
        "compile) where a compilation is waited for, K / max(K step slowdown, compile) in the "
        "background; step is a micro-step's time with nothing compiled. The study measured its "
        "first two rows and computed the others. ML Programs are evaluated on this CPU, and "
        "compiled on it too.",
    ]
    return document(record, "The optimizations together, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Speedups of the stages and the study's."""
    by_case: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        by_case.setdefault(row["of"], {})[row["stage"]] = row["speedup"]
    if not by_case:
        return None
    theirs = {stage: published(stage, "speedup") for stage in STAGES}
    return plots.bars(
        f"The optimizations together, {record['device']}",
        {"study, M1 Pro's Neural Engine": theirs, **by_case},
        "one added to the other", "micro-steps/s, over the first",
        names={stage: PUBLISHED[stage].row for stage in STAGES},
    )  # fmt: skip
