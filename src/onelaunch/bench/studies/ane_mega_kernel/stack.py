"""stack: what the optimizations of a training step bring together, one added to the other.

Training through ML Programs with 10 micro-steps an update and each compilation waited for; with
100; with 100 and compilations in the background; and with none at all, the programs kept. The
published study measured the first two and computed the others. They take turns in rounds, each
beginning with an update that is not timed, in the state that such training is in; before the next
one's turn, compilations have ended. Beside each rate that of the model: K / (K step + compile)
waiting, K / max(K step slowdown, compile) in the background. With PyTorch, on the device given,
nothing is compiled: there the last row is without the optimizer's step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.rounds import in_rounds, ratio
from onelaunch.bench.core.tables import digits, document, markdown, spread
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    Driver,
    Update,
    driver,
    pytorch_driver,
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
STAGES = ("stack-baseline", "stack-accumulation", "stack-background", "stack-asymptote")


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    cases, long = (QUICK_CASES, QUICK_LONG) if quick else (CASES, LONG)
    if reason := why_no_programs(device):
        say(f"without ML Programs: {reason}")
    else:
        for model, sequence, rounds in cases:
            yield from _programs(model, sequence, rounds, long)
    for model, sequence, rounds in cases:
        training = pytorch_driver(model, sequence, device)
        yield from _pytorch(training, model, PYTORCH_ROUNDS * rounds, long)


def _programs(model: str, sequence: int, rounds: int, long: int) -> Iterator[Row]:
    timed: dict[str, list[Update]] = {stage: [] for stage in STAGES}
    with (
        driver(model, sequence, staleness=0) as waiting,
        driver(model, sequence, staleness=1) as background,
    ):
        for each in (waiting, background):
            each.update(2)
            each.engine.settle()

        def turn(
            stage: str, training: Driver[CoreMLTrainer], k: int, renew: bool = True
        ) -> Callable[[], float]:
            def rate() -> float:
                if renew:
                    training.update(1)  # its end asks for what is compiled in the next
                count = BASELINE_UPDATES if stage == "stack-baseline" else 1
                updates = [training.update(k, renew) for _ in range(count)]
                if stage == "stack-background":
                    updates = [_with_wait(updates[0], training.engine)]
                training.engine.settle()
                timed[stage] += updates
                return count * k / sum(update.seconds for update in updates)

            return rate

        baseline, accumulation, hidden, asymptote = STAGES
        samples = in_rounds(
            {
                baseline: turn(baseline, waiting, SHORT),
                accumulation: turn(accumulation, waiting, long),
                hidden: turn(hidden, background, long),
                asymptote: turn(asymptote, waiting, long, renew=False),
            },
            rounds,
        )
        schedule = background.engine.schedule
    alone = statistics.median(u.seconds / u.micro_steps for u in timed[asymptote])
    stalls = [u.stall_seconds for stage in (baseline, accumulation) for u in timed[stage]]
    compiling = statistics.median(stalls)
    beside, slowdown = schedule.compile_seconds or compiling, schedule.slowdown or 1.0
    models = {
        baseline: throughput(SHORT, compiling, alone, 1.0, overlapped=False),
        accumulation: throughput(long, compiling, alone, 1.0, overlapped=False),
        hidden: throughput(long, beside, alone, slowdown, overlapped=True),
        asymptote: 1 / alone,
    }
    for stage in STAGES:
        notes = {
            "model": round(models[stage], 4),
            "compile_seconds": {
                baseline: round(compiling, 4), accumulation: round(compiling, 4),
                hidden: round(beside, 4), asymptote: 0.0,
            }[stage],
            "step": round(alone, 6),
            "slowdown": round(slowdown, 4) if stage == hidden else 1.0,
            "wait_share": round(
                statistics.median(u.stall_seconds / u.seconds for u in timed[stage]), 5
            ),
        }  # fmt: skip
        case = f"ML Programs {model} 1x{sequence}"
        yield _row(case, stage, samples, SHORT if stage == baseline else long, notes)


def _with_wait(update: Update, engine: CoreMLTrainer) -> Update:
    """With the wait that the next update would begin with: what was compiled beside this one may
    not be done."""
    start = time.perf_counter()
    engine.settle(engine.version - engine.staleness)
    wait = time.perf_counter() - start
    stall = update.stall_seconds + wait
    return replace(update, seconds=update.seconds + wait, stall_seconds=stall)


def _pytorch(training: Driver[Any], model: str, rounds: int, long: int) -> Iterator[Row]:
    def rate(k: int) -> Callable[[], float]:
        def updated() -> float:
            updates = [training.update(k) for _ in range(long // k)]  # as many micro-steps
            return len(updates) * k / sum(update.seconds for update in updates)

        return updated

    def bare() -> float:
        training.wait()
        start = time.perf_counter()
        for _ in range(long):
            training.micro_step(1 / long)
        training.wait()
        seconds = time.perf_counter() - start
        training.optimizer.zero_grad()
        return long / seconds

    training.update(SHORT)
    baseline, accumulation, _, asymptote = STAGES
    samples = in_rounds({baseline: rate(SHORT), accumulation: rate(long), asymptote: bare}, rounds)
    for stage in samples:
        case = f"PyTorch {model} 1x{training.sequence}"
        yield _row(case, stage, samples, SHORT if stage == baseline else long, {})


def _row(
    case: str, stage: str, samples: dict[str, list[float]], k: int, notes: dict[str, Any]
) -> Row:
    row = Row.of(
        f"{case}: {_label(stage, k)}",
        samples[stage],
        notes={
            "of": case,
            "stage": stage,
            "k": k,
            "speedup": round(ratio(samples[stage], samples[STAGES[0]]), 4),
            "threads": torch.get_num_threads(),
            **notes,
        },
    )
    return row


def _label(stage: str, k: int) -> str:
    more = {
        "stack-background": ", compiled in the background",
        "stack-asymptote": ", no overhead at all",
    }
    return f"{k} micro-steps an update{more.get(stage, '')}"


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of every stage, its speedup over the first; of the one in the background, the model too."""
    found = []
    first = {row["of"]: row for row in record["rows"] if row["stage"] == STAGES[0]}
    for row in record["rows"]:
        key, values = row["stage"], PUBLISHED[row["stage"]].values
        theirs = f"{values['micro-steps/s']:g} micro-steps/s"
        ours = f"{row['ours']:.2f} micro-steps/s"
        if key == STAGES[0]:
            claim = f"{row['of']}: what the others are over"
            why = "another machine and another model; their ratios follow"
            found.append(Finding((key,), claim, theirs, ours, "not applicable", why))
            continue
        published = float(values["speedup"])
        error = error_of_ratio(row["speedup"], row, first[row["of"]])
        verdict, why = of_a_gain(row["speedup"], published, error)
        if row["k"] != LONG:
            verdict, why = "quick run", f"{row['k']} micro-steps an update"
        computed = "" if key == STAGES[1] else ", computed"
        found.append(
            Finding(
                (key,),
                row["case"],
                f"{published:g} times the baseline, {theirs}{computed}",
                f"{row['speedup']:.2f} times, {ours}",
                verdict,
                f"{why}; weights are arguments here: only the optimizer's step is shared by more",
                row["speedup"] / published,
            )
        )
        if key == STAGES[2]:
            what = "K / max(K step slowdown, compile) says what the background brings"
            claim = f"{row['of']}: {what}"
            by_model = f"{row['ours']:.2f} measured, {row['model']:.2f} by the model"
            told = "5.24 by such a model"
            found.append(Finding((key,), claim, told, by_model, "not applicable", ""))
    return without_evaluated_seconds(found)


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    parts = [
        markdown(
            [
                "", "micro-steps/s", "p20-p80", "speedup", "by the model", "waiting",
                "compiling, s", "study", "speedup",
            ],
            [_line(row) for row in record["rows"]],
        ),
        "Speedups are over the first row of each, round by round. The model: K / (K step + "
        "compile) where a compilation is waited for, K / max(K step slowdown, compile) in the "
        "background; step is a micro-step's time with nothing compiled. The study measured its "
        "first two rows and computed the others. ML Programs are evaluated on this CPU, and "
        "compiled on it too.",
    ]  # fmt: skip
    return document(record, "The optimizations together, on", *parts)


def _line(row: dict[str, Any]) -> list[str]:
    published = PUBLISHED[row["stage"]].values
    waits = "-" if "wait_share" not in row else f"{row['wait_share']:.1%}"
    return [
        row["case"], digits(row["ours"]), spread(row),
        f"{row['speedup']:.2f}", digits(row.get("model")), waits,
        digits(row.get("compile_seconds")), f"{published['micro-steps/s']:g}",
        f"{published['speedup']:g}",
    ]  # fmt: skip


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Speedups of the stages and the study's."""
    theirs = {stage: float(PUBLISHED[stage].values["speedup"]) for stage in STAGES}
    by_case: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        by_case.setdefault(row["of"], {})[row["stage"]] = row["speedup"]
    if not by_case:
        return None
    return plots.bars(
        f"The optimizations together, {record['device']}",
        {"study, M1 Pro's Neural Engine": theirs, **by_case},
        "one added to the other", "micro-steps/s, over the first",
        names={stage: PUBLISHED[stage].row for stage in STAGES},
    )  # fmt: skip
