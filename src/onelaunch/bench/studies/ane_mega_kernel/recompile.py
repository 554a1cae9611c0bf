"""recompile: how many micro-steps hide the compilation that every update needs.

Where weights are constants an update means new programs. While they are compiled the version before
serves, and an update of K = compile / step micro-steps waits for nothing. First the published
study's table, by its own times; then training through ML Programs here: K as it is measured, then
updates of K, of half as many and of twice as many, and how long each waits. What is compiled is
emitting, converting, saving and reading back; what runs is their evaluation on this CPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from onelaunch.bench.core.findings import Finding, needs_a_mac
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import column, median_and_spread, published, table_of
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    Driver,
    Update,
    driver,
    median_share,
    rate,
)
from onelaunch.compilation.schedule import MicroStepEstimator, micro_steps_to_hide, throughput
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.training import CoreMLTrainer

UNIT = "s"
KEYS = ("hide-15m-ffn", "hide-15m", "hide-110m-ffn", "hide-110m-4", "hide-110m")
MEASURED_STEP = 0.1687
"""Seconds of a whole micro-step of stories110M, as the study measured it elsewhere."""
NEAR = 0.03
"""How far a K may be off and still be the published one: its times are rounded."""
HIDDEN = 0.02
"""Of an update: waiting less than this is no wait."""
CLEARLY_HIDDEN, LONGER = 0.01, 4
"""What updates of K are to wait at most, and how often K is made longer for it."""
NEARLY = 0.2
"""Of an update: where half of K waits less than this, the fewest that hide a compilation are near
half of K, and whether half does is chance."""
CASES = (("stories260k", 64, 16), ("stories15m", 32, 4))
"""Model, tokens, and micro-steps of the updates from which K is estimated."""
QUICK_CASES = CASES[:1]
FIRST_UPDATES, QUICK_FIRST_UPDATES = 8, 5
FINDING_UPDATES = 4
ROUNDS, UPDATES = 2, 4
"""Of each length, after one that is not counted."""
QUICK_ROUNDS, QUICK_UPDATES = 1, 2


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    coremltools("bench recompile")
    for key in KEYS:
        compiling, step = published(key, "compiling, s"), published(key, "micro-step, s")
        yield _of_times(PUBLISHED[key].row, compiling, step, int(published(key, "K")))
    yield _of_times("stories110M, whole, its measured step", compiling, MEASURED_STEP, None)
    for model, sequence, first_k in QUICK_CASES if quick else CASES:
        with driver(model, sequence) as training:
            yield from _case(f"{model} 1x{sequence}", training, first_k, quick, log)


def _of_times(what: str, compiling: float, step: float, published_k: int | None) -> Row:
    k = micro_steps_to_hide(compiling, step)
    notes = {"step": step, "k": k, "published_k": published_k}
    return Row(f"published: {what}", compiling, notes=notes)


def _to_hide(schedule: MicroStepEstimator) -> int:
    """By a compilation during the work, and the shorter one of a micro-step alone and during a
    compilation: those alone may be the first ones, which are slow."""
    steps = [s for s in (schedule.step_seconds, schedule.step_seconds_compiling) if s is not None]
    if schedule.compile_seconds is None or not steps:
        return schedule.k
    return micro_steps_to_hide(schedule.compile_seconds, min(steps))


def _updates(training: Driver[CoreMLTrainer], k: int, count: int) -> list[Update]:
    """Some of k micro-steps each, after one whose programs an update of another length began."""
    training.update(k)
    return [training.update(k) for _ in range(count)]


def settled(k: int, waits: Callable[[int], float]) -> int:
    """K by times, which were not all taken at the same time, may be too large or too small: half
    of it, as long as half hides a compilation too; three quarters, where half nearly does; a
    quarter more, a few times, where K itself does not. `waits` returns the share of an update of so
    many micro-steps that it waits."""
    while k > 1:
        share = waits(k // 2)
        if share > HIDDEN:
            k = 3 * k // 4 if share < NEARLY else k
            break
        k //= 2
    for _ in range(LONGER):
        if waits(k) <= CLEARLY_HIDDEN:
            break
        k += -(-k // 4)
    return k


def _case(
    case: str, training: Driver[CoreMLTrainer], first_k: int, quick: bool, log: Log
) -> Iterator[Row]:
    k, schedule = first_k, training.engine.schedule
    first = QUICK_FIRST_UPDATES if quick else FIRST_UPDATES
    for number in range(first):
        # of the K so far: during fewer micro-steps a compilation has the machine for itself while
        # the update waits, and seems shorter than it will be
        training.update(k)
        k = max(k, _to_hide(schedule))
        log(f"{case}: {number + 1} of {first} updates to find K: {k}")
    count = QUICK_UPDATES if quick else FINDING_UPDATES

    def waits(k: int) -> float:
        share = median_share(_updates(training, k, count))
        log(f"{case}: updates of {k} wait {share:.1%}")
        return share

    k = settled(k, waits)
    timed: dict[int, list[Update]] = {each: [] for each in sorted({max(1, k // 2), k, 2 * k})}
    # in turn, as the machine has better and worse times
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for each, updates in timed.items():
            updates += _updates(training, each, QUICK_UPDATES if quick else UPDATES)
    compiling, step = schedule.compile_seconds, schedule.step_seconds_compiling
    assert compiling is not None
    for each, updates in timed.items():
        rates = [rate([update]) for update in updates]
        notes = {
            "k": each,
            "compile_seconds": round(compiling, 4),
            "step": round(step or schedule.step_seconds or math.nan, 5),
            "slowdown": schedule.slowdown and round(schedule.slowdown, 3),
            "micro_steps_per_s": round(statistics.median(rates), 3),
            "wait_share": round(median_share(updates), 4),
            "threads": torch.get_num_threads(),
        }
        name = "K" if each == k else "K/2" if each < k else "2K"
        yield Row.of(f"{case}, {name}", [each.stall_seconds for each in updates], notes=notes)


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings for each K of the published table by its own times, and on whether K hides here."""
    rows = {row["case"]: row for row in record["rows"]}
    results = []
    for key in KEYS:
        row = rows.get(f"published: {PUBLISHED[key].row}")
        if row is None:
            continue
        ratio = row["k"] / row["published_k"]
        results.append(
            Finding(
                (key,),
                f"{PUBLISHED[key].row}: micro-steps that hide {row['ours']:g} s of compiling",
                f"K {row['published_k']}",
                f"K {row['k']}, by its own times",
                "arithmetic" if abs(ratio - 1) <= NEAR else "refuted",
                "compile / step, rounded up: the study's own numbers agree with each other"
                + ("" if ratio == 1 else f", {ratio - 1:+.1%}"),
                ratio,
            )
        )
    for case in sorted({case.rsplit(",", 1)[0] for case in rows if "wait_share" in rows[case]}):
        if not {f"{case}, K", f"{case}, K/2"} <= rows.keys():
            continue
        whole, half = rows[f"{case}, K"], rows[f"{case}, K/2"]
        results.append(
            Finding(
                KEYS,
                f"{case} here: K micro-steps hide a compilation, fewer do not",
                "not measured",
                f"K {whole['k']} waits {whole['wait_share']:.1%} of an update, "
                f"K {half['k']} {half['wait_share']:.1%}",
                *needs_a_mac(
                    f"{whole['compile_seconds']:.2f} s of compiling during micro-steps of "
                    f"{1e3 * whole['step']:.0f} ms, which are of an evaluator"
                ),
            )
        )
    return results


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = [
        "## The published table, by its own times",
        table_of(
            [row for row in record["rows"] if "published_k" in row],
            ("", lambda row: row["case"].removeprefix("published: ")),
            column("compiling, s", "ours", digits),
            column("micro-step, s", "step", "{:g}"),
            column("K = compile / step", "k"),
            column("K as published", "published_k"),
        ),
        "About 8 ms for a step of stories110M is no whole micro-step; with the 168.7 ms that the "
        "same study measured for one K is 25.",
    ]
    if measured := [row for row in record["rows"] if "wait_share" in row]:
        parts += [
            "## Training through ML Programs on this CPU",
            table_of(
                measured,
                column("one sequence at a time", "case"),
                column("micro-steps an update", "k"),
                *median_and_spread("waits, s (median)", "{:.3f}"),
                column("of the update", "wait_share", "{:.1%}"),
                column("compiling meanwhile, s", "compile_seconds", digits),
                column("micro-step meanwhile, s", "step", "{:.4f}"),
                column("micro-steps/s", "micro_steps_per_s", digits),
                ("by the model", _by_the_model),
            ),
            "Compiling is emitting, converting, saving and reading back, in a process of low "
            "priority; a micro-step is the evaluation of forward and backward programs. K is the "
            "time of a compilation during training over that of a micro-step, in updates of K, the "
            f"largest of {FIRST_UPDATES} updates; half of that as long as half hides it too, three "
            "quarters where it nearly does, a quarter more where K itself does not. The model: K / "
            "max(K step, compile).",
        ]
    return document(record, "Micro-steps that hide a compilation, on", *parts)


def _by_the_model(row: dict[str, Any]) -> str:
    """Micro-steps a second."""
    return digits(throughput(row["k"], row["compile_seconds"], row["step"], 1.0, overlapped=True))
