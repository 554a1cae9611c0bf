"""recompile: how many micro-steps hide the compilation that every update asks for.

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
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.tables import digits, document, markdown, spread
from onelaunch.bench.studies.ane_mega_kernel.program_training import Driver, Update, driver
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
"""Model, tokens, and micro-steps of the updates from which K is found."""
QUICK_CASES = CASES[:1]
FIRST_UPDATES, QUICK_FIRST_UPDATES = 8, 5
FINDING_UPDATES = 4
ROUNDS, UPDATES = 2, 4
"""Of each length, after one that is not counted."""
QUICK_ROUNDS, QUICK_UPDATES = 1, 2


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    coremltools("bench recompile")
    for key in KEYS:
        values = PUBLISHED[key].values
        compiling, step = float(values["compiling, s"]), float(values["micro-step, s"])
        yield _published(PUBLISHED[key].row, compiling, step, int(values["K"]))
    yield _published("stories110M, whole, its measured step", compiling, MEASURED_STEP, None)
    for model, sequence, first_k in QUICK_CASES if quick else CASES:
        with driver(model, sequence) as training:
            yield from _case(f"{model} 1x{sequence}", training, first_k, quick, say)


def _published(what: str, compiling: float, step: float, given: int | None) -> Row:
    k = micro_steps_to_hide(compiling, step)
    notes = {"step": step, "k": k, "published_k": given}
    return Row(f"published: {what}", compiling, notes=notes)


def _to_hide(schedule: MicroStepEstimator) -> int:
    """By a compilation beside the work, and the shorter one of a micro-step alone and beside it:
    those alone may be the first ones, which are slow."""
    steps = [s for s in (schedule.step_seconds, schedule.step_seconds_compiling) if s is not None]
    if schedule.compile_seconds is None or not steps:
        return schedule.k
    return micro_steps_to_hide(schedule.compile_seconds, min(steps))


def _waits(case: str, training: Driver[CoreMLTrainer], k: int, count: int, say: Say) -> float:
    """The share of an update of K micro-steps that it waits: the median of some."""
    training.update(k)  # whose programs an update of another length has asked for
    updates = [training.update(k) for _ in range(count)]
    share = statistics.median(each.stall_seconds / each.seconds for each in updates)
    say(f"{case}: updates of {k} wait {share:.1%}")
    return share


def settled(k: int, waits: Callable[[int], float]) -> int:
    """K by times, which were not all taken at the same time, may be too large or too small: half
    of it, as long as half hides a compilation too; three quarters, where half nearly does; a
    quarter more, a few times, where K itself does not."""
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
    case: str, training: Driver[CoreMLTrainer], first_k: int, quick: bool, say: Say
) -> Iterator[Row]:
    k, schedule = first_k, training.engine.schedule
    first = QUICK_FIRST_UPDATES if quick else FIRST_UPDATES
    for number in range(first):
        # of the K found so far: beside fewer micro-steps a compilation has the machine for itself
        # while the update waits, and seems shorter than it will be
        training.update(k)
        k = max(k, _to_hide(schedule))
        say(f"{case}: {number + 1} of {first} updates to find K: {k}")
    count = QUICK_UPDATES if quick else FINDING_UPDATES
    k = settled(k, lambda each: _waits(case, training, each, count, say))
    ks = sorted({max(1, k // 2), k, 2 * k})
    timed: dict[int, list[Update]] = {each: [] for each in ks}
    # in turn, as the machine has better and worse times
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for each in ks:
            training.update(each)  # whose programs an update of another length has asked for
            for _ in range(QUICK_UPDATES if quick else UPDATES):
                timed[each].append(training.update(each))
    compiling, step = schedule.compile_seconds, schedule.step_seconds_compiling
    assert compiling is not None
    for each, updates in timed.items():
        waits = [update.stall_seconds for update in updates]
        rates = [update.micro_steps / update.seconds for update in updates]
        yield Row.of(
            f"{case}, {'K' if each == k else 'K/2' if each < k else '2K'}",
            waits,
            notes={
                "k": each,
                "compile_seconds": round(compiling, 4),
                "step": round(step or schedule.step_seconds or math.nan, 5),
                "slowdown": schedule.slowdown and round(schedule.slowdown, 3),
                "micro_steps_per_s": round(statistics.median(rates), 3),
                "wait_share": round(
                    statistics.median(u.stall_seconds / u.seconds for u in updates), 4
                ),
                "threads": torch.get_num_threads(),
            },
        )


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of each K of the published table by its own times, and of whether K hides here."""
    rows = {row["case"]: row for row in record["rows"]}
    found = []
    for key in KEYS:
        row = rows.get(f"published: {PUBLISHED[key].row}")
        if row is None:
            continue
        ratio = row["k"] / row["published_k"]
        near = abs(ratio - 1) <= NEAR
        found.append(
            Finding(
                (key,),
                f"{PUBLISHED[key].row}: micro-steps that hide {row['ours']:g} s of compiling",
                f"K {row['published_k']}",
                f"K {row['k']}, by its own times",
                "arithmetic" if near else "refuted",
                "compile / step, rounded up: the study's own numbers agree with each other"
                + ("" if ratio == 1 else f", {ratio - 1:+.1%}"),
                ratio,
            )
        )
    models = {case.rsplit(",", 1)[0] for case in rows if "wait_share" in rows[case]}
    for model in sorted(models):
        if not {f"{model}, K", f"{model}, K/2"} <= rows.keys():
            continue
        whole, half = rows[f"{model}, K"], rows[f"{model}, K/2"]
        found.append(
            Finding(
                KEYS,
                f"{model} here: K micro-steps hide a compilation, fewer do not",
                "not measured",
                f"K {whole['k']} waits {whole['wait_share']:.1%} of an update, "
                f"K {half['k']} {half['wait_share']:.1%}",
                *needs_a_mac(
                    f"{whole['compile_seconds']:.2f} s of compiling beside micro-steps of "
                    f"{1e3 * whole['step']:.0f} ms, which are of an evaluator"
                ),
            )
        )
    return found


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    rows = record["rows"]
    published = [row for row in rows if "published_k" in row]
    measured = [row for row in rows if "wait_share" in row]
    parts = [
        "## The published table, by its own times",
        markdown(
            ["", "compiling, s", "micro-step, s", "K = compile / step", "K as published"],
            [
                [
                    row["case"].removeprefix("published: "), digits(row["ours"]),
                    f"{row['step']:g}", f"{row['k']}", str(row["published_k"] or "-"),
                ]
                for row in published
            ],
        ),
        "About 8 ms for a step of stories110M is no whole micro-step; with the 168.7 ms that the "
        "same study measured for one K is 25.",
    ]  # fmt: skip
    if measured:
        parts += [
            "## Training through ML Programs on this CPU",
            markdown(
                [
                    "one text at a time", "micro-steps an update", "waits, s (median)", "p20-p80",
                    "of the update", "compiling beside it, s", "micro-step beside it, s",
                    "micro-steps/s", "by the model",
                ],
                [_line(row) for row in measured],
            ),
            "Compiling is emitting, converting, saving and reading back, in a process of low "
            "priority; a micro-step is the evaluation of forward and backward programs. K is a "
            "compilation's time beside the work over a micro-step's, in updates of K, the most of "
            f"{FIRST_UPDATES} updates; half of that as long as half hides it too, three quarters "
            "where it nearly does, a quarter more where K itself does not. The model: K / max(K "
            "step, compile).",
        ]  # fmt: skip
    return document(record, "Micro-steps that hide a compilation, on", *parts)


def _line(row: dict[str, Any]) -> list[str]:
    model = throughput(row["k"], row["compile_seconds"], row["step"], 1.0, overlapped=True)
    return [
        row["case"], f"{row['k']}", f"{row['ours']:.3f}", spread(row, "{:.3f}".format),
        f"{row['wait_share']:.1%}", digits(row["compile_seconds"]), f"{row['step']:.4f}",
        digits(row["micro_steps_per_s"]), digits(model),
    ]  # fmt: skip
