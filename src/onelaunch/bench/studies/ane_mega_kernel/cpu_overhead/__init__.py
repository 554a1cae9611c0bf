"""cpu-overhead: what the host takes besides arithmetic in a step, and what a call costs it.

The published study probed what its backward needs of the CPU: 133 buffers of 144 MB together
allocated and freed, the same copied, 24 sums of 4.7 million elements, 228 pairs of locks, and found
4 ms of a step of 169. The same amounts here; then what Python pays for an operation of PyTorch, for
a call of this package's compiled program, on a GPU for a launch, and for reading the loss after
each step of a small model instead of never.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, below, standard_error, unless
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import Samples, in_rounds, ratio
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import CASE, N, column, median_and_spread, published, table_of
from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead import cases

UNIT = "ms"
ROUNDS, QUICK_ROUNDS = 25, 9
STEP_ROUNDS, QUICK_STEP_ROUNDS = 15, 5
LITTLE = 0.05
"""Of the study's micro-step: what takes less does not bound it."""
MOST_TIMES = 2.0
"""A published time is confirmed up to so many times: the memory and the cores are others."""
MEGABYTES = cases.BUFFERS * cases.BUFFER_BYTES / 1e6

ALLOCATED = f"{cases.BUFFERS} buffers allocated and freed"
COPIED = f"{MEGABYTES:.0f} MB copied"
SUMMED = f"{cases.SUMS} sums, {cases.SUMS * cases.ELEMENTS / 1e6:.1f} million elements"
LOCKED = f"{cases.LOCKS} pairs of locks"
STEP = "a small training step"
ANSWERS = {
    "host-allocation": (ALLOCATED, "numpy"),
    "host-copies": (COPIED, "numpy"),
    "host-sums": (SUMMED, "numpy"),
    "host-locks": (LOCKED, "threading"),
}


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """The host's cases on any device; on a GPU those of its own too."""
    place = torch.device(device)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    host = {
        ALLOCATED: cases.allocations, COPIED: cases.copies, SUMMED: cases.sums, LOCKED: cases.locks,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the study's loops have one
    try:
        samples = {what: in_rounds(cases.timed(make()), rounds) for what, make in host.items()}
    finally:
        torch.set_num_threads(threads)
    for what, by_name in samples.items():
        yield from _rows(what, by_name)
    calls = {"an operation of torch": cases.dispatch(torch.device("cpu"))}
    calls |= _compiled_call(log)
    if place.type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead import cuda

        for what, contestants in cuda.groups(place):
            yield from _rows(what, in_rounds(contestants, rounds))
        calls["an operation of torch on the GPU"] = cases.dispatch(place)
        calls |= cuda.launch(place)
    yield from _rows("a call from Python", in_rounds(calls, rounds), unit="us", calls=cases.CALLS)
    yield from _steps(place, QUICK_STEP_ROUNDS if quick else STEP_ROUNDS)


def _rows(what: str, samples: Samples, **notes: object) -> Iterator[Row]:
    for name, values in samples.items():
        yield Row.of(f"{what}, {name}", values, notes={"what": what, "by": name, **notes})


def _compiled_call(log: Log) -> Mapping[str, cases.Sample]:
    """A call of the CPU engine's program that returns a number and does nothing else."""
    from onelaunch.engines.cpu import why_not

    if reason := why_not():
        log(f"without the CPU engine's program: {reason}")
        return {}
    from onelaunch.bench.core.compiled import compiled_program
    from onelaunch.engines.cpu.layout import Operation

    program = compiled_program(log)

    def sample() -> float:  # holds the program: its code goes with it
        return cases.of_each(lambda: program.call(Operation.SHAPE, 0, 0, 0), cases.CALLS)

    return {"the CPU engine's program": sample}


def _steps(place: torch.device, rounds: int) -> Iterator[Row]:
    """Time steps with and without `loss.item()`, in turn."""
    step = cases.TrainingStep(place)
    samples = in_rounds(
        {"never": partial(step.sample, False), "each step": partial(step.sample, True)}, rounds
    )
    for name, values in samples.items():
        notes = {
            "what": STEP, "by": name, "place": place.type, "steps": cases.STEPS,
            "of_never": round(ratio(values, samples["never"]), 4),
        }  # fmt: skip
        yield Row.of(f"{STEP} on {place.type}, the loss asked for {name}", values, notes=notes)


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings for each part of the study's probe: whether it is little, and whether it is as
    little."""
    rows = {(row["what"], row["by"]): row for row in record["rows"]}
    step, results = published("part-whole", "ms"), []
    for key, where in ANSWERS.items():
        if where not in rows:
            continue
        row, theirs, name = rows[where], published(key, "ms"), PUBLISHED[key].row
        error = standard_error(row["spread"], row["n"])
        little = below(row["ours"], LITTLE * step, error)
        as_little = below(row["ours"] / theirs, MOST_TIMES, error / theirs)
        under = "under " if key == "host-allocation" else ""
        figures = f"{under}{theirs:g} ms", f"{digits(row['ours'])} ms"
        results += [
            Finding(
                (key,), f"{name} take the host little", *figures, little,
                f"{row['ours'] / step:.1%} of the study's micro-step; {LITTLE:.0%} is little; "
                f"{_about(key, rows)}{unless(little)}",
            ),
            Finding(
                (key,), f"{name} take the host no more than there", *figures, as_little,
                f"up to {MOST_TIMES:g} times is confirmed{unless(as_little)}", row["ours"] / theirs,
            ),
        ]  # fmt: skip
    return results


def _about(key: str, rows: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    if key == "host-allocation" and (row := rows.get((ALLOCATED, "every page written"))):
        return f"nothing is written; with a byte in every page {digits(row['ours'])} ms"
    if key == "host-copies":
        row = rows[COPIED, "numpy"]
        return f"{2 * MEGABYTES / row['ours']:.1f} GB/s read and written, one thread"
    if key == "host-locks":
        return "Python's own lock, without contention; the study's are of shared surfaces"
    return "float32, one thread"


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    rows = record["rows"]
    theirs = {where: f"{published(key, 'ms'):g}" for key, where in ANSWERS.items()}
    in_ms = [row for row in rows if row.get("unit", UNIT) == UNIT and row["what"] != STEP]
    parts = [
        "## What a step needs",
        table_of(
            in_ms,
            CASE,
            *median_and_spread("ms"),
            N,
            ("the study, ms", lambda row: theirs.get((row["what"], row["by"]), "-")),
        ),
        "Together, one after another, on one thread. The study's total is under 4 ms of 169; its "
        "allocation is under 0.1 ms. Allocating writes nothing: a buffer's pages come when they "
        "are written, and cost then.",
    ]
    if calls := [row for row in rows if row.get("unit") == "us"]:
        parts += [
            "## What a call costs Python",
            table_of(calls, CASE, *median_and_spread("us"), N),
            f"{cases.CALLS:,} calls back to back. An operation of torch adds one number to one "
            "number; the CPU engine's program returns a constant. On a GPU nothing is waited for.",
        ]
    if steps := [row for row in rows if row["what"] == STEP]:
        never = column("of never", "of_never", "{:.3f}x")
        parts += [
            "## Reading the loss after each step",
            table_of(steps, CASE, *median_and_spread("ms a step"), N, never),
            "`loss.item()` waits for the device; on a CPU there is nothing to be waited for.",
        ]
    return document(record, "What the host takes besides arithmetic, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Milliseconds of what a step needs, ours and the study's."""
    rows = {(row["what"], row["by"]): row["ours"] for row in record["rows"]}
    shown = {key: where for key, where in ANSWERS.items() if where in rows}
    return plots.bars(
        f"What the host takes in a step, {record['device']}",
        {
            "here": {where[0]: rows[where] for where in shown.values()},
            "the study, an M1 Pro": {where[0]: published(k, "ms") for k, where in shown.items()},
        },
        "ms", "", across=True, log="x",
    )  # fmt: skip
