"""cpu-overhead: what the host takes beside arithmetic in a step, and what a call costs it.

The published study probed what its backward asks of the CPU: 133 buffers of 144 MB together
allocated and freed, the same copied, 24 sums of 4.7 million elements, 228 pairs of locks, and found
4 ms of a step of 169. The same amounts here; then what Python pays for an operation of PyTorch, for
a call of this package's compiled program, on a GPU for a launch, and for asking for the loss after
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
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.rounds import Samples, in_rounds, ratio
from onelaunch.bench.core.tables import digits, document, markdown, spread
from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead.cases import (
    BUFFER_BYTES,
    BUFFERS,
    CALLS,
    ELEMENTS,
    LOCKS,
    STEPS,
    SUMS,
    Sample,
    TrainingStep,
    allocations,
    copies,
    dispatch,
    locks,
    of_each,
    sums,
)

UNIT = "ms"
ROUNDS, QUICK_ROUNDS = 25, 9
STEP_ROUNDS, QUICK_STEP_ROUNDS = 15, 5
LITTLE = 0.05
"""Of the study's micro-step: what takes less does not bound it."""
MOST_TIMES = 2.0
"""A published time is confirmed up to so many times: the memory and the cores are others."""
MEGABYTES = BUFFERS * BUFFER_BYTES / 1e6

ALLOCATED = f"{BUFFERS} buffers allocated and freed"
COPIED = f"{MEGABYTES:.0f} MB copied"
SUMMED = f"{SUMS} sums, {SUMS * ELEMENTS / 1e6:.1f} million elements"
LOCKED = f"{LOCKS} pairs of locks"
STEP = "a small training step"
ANSWERS = {
    "host-allocation": (ALLOCATED, "numpy"),
    "host-copies": (COPIED, "numpy"),
    "host-sums": (SUMMED, "numpy"),
    "host-locks": (LOCKED, "threading"),
}


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """The host's cases on any device; on a GPU those of its own too."""
    place = torch.device(device)
    yield from _rows(place, quick, say)


def _rows(place: torch.device, quick: bool, say: Say) -> Iterator[Row]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    host = (ALLOCATED, allocations), (COPIED, copies), (SUMMED, sums), (LOCKED, locks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the study's loops have one
    try:
        found = {what: in_rounds(make(), rounds) for what, make in host}
    finally:
        torch.set_num_threads(threads)
    for what, samples in found.items():
        yield from _of_samples(what, samples)
    calls = {"an operation of torch": dispatch(torch.device("cpu"))}
    calls |= _compiled_call(say)
    if place.type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead import cuda as cpu_overhead_cuda

        for what, contestants in cpu_overhead_cuda.groups(place):
            yield from _of_samples(what, in_rounds(contestants, rounds))
        calls["an operation of torch on the GPU"] = dispatch(place)
        calls |= cpu_overhead_cuda.launch(place)
    yield from _of_samples("a call from Python", in_rounds(calls, rounds), unit="us", calls=CALLS)
    yield from _steps(place, STEP_ROUNDS if not quick else QUICK_STEP_ROUNDS)


def _of_samples(what: str, samples: Samples, **notes: object) -> Iterator[Row]:
    for name, values in samples.items():
        yield Row.of(f"{what}, {name}", values, notes={"what": what, "by": name, **notes})


def _compiled_call(say: Say) -> Mapping[str, Sample]:
    """A call of the CPU engine's program that asks for a number and nothing else."""
    from onelaunch.engines.cpu import why_not

    if reason := why_not():
        say(f"without the CPU engine's program: {reason}")
        return {}
    from onelaunch.bench.core.compiled import compiled_program
    from onelaunch.engines.cpu.layout import Operation

    program = compiled_program(say)

    def sample() -> float:  # holds the program: its code goes with it
        return of_each(lambda: program.call(Operation.SHAPE, 0, 0, 0), CALLS)

    return {"the CPU engine's program": sample}


def _steps(place: torch.device, rounds: int) -> Iterator[Row]:
    """With and without `loss.item()`, in turn."""
    step = TrainingStep(place)
    samples = in_rounds(
        {"never": partial(step.sample, False), "each step": partial(step.sample, True)}, rounds
    )
    for name, values in samples.items():
        yield Row.of(
            f"{STEP} on {place.type}, the loss asked for {name}",
            values,
            notes={
                "what": STEP, "by": name, "place": place.type, "steps": STEPS,
                "of_never": round(ratio(values, samples["never"]), 4),
            },
        )  # fmt: skip


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of each part of the study's probe: whether it is little, and whether it is as little."""
    rows = {(row["what"], row["by"]): row for row in record["rows"]}
    step, found = float(PUBLISHED["part-whole"].values["ms"]), []
    for key, where in ANSWERS.items():
        row, published = rows.get(where), float(PUBLISHED[key].values["ms"])
        if row is None:
            continue
        told = (
            f"{'under ' if key == 'host-allocation' else ''}{published:g} ms",
            f"{digits(row['ours'])} ms",
        )
        times, why = row["ours"] / published, _why(key, rows)
        error = standard_error(row["spread"], row["n"])
        little = below(row["ours"], LITTLE * step, error)
        as_little = below(times, MOST_TIMES, error / published)
        found += [
            Finding(
                (key,), f"{PUBLISHED[key].row} take the host little", *told, little,
                f"{row['ours'] / step:.1%} of the study's micro-step; {LITTLE:.0%} is little; "
                f"{why}{unless(little)}",
            ),
            Finding(
                (key,), f"{PUBLISHED[key].row} take the host no more than there", *told, as_little,
                f"up to {MOST_TIMES:g} times is confirmed{unless(as_little)}", times,
            ),
        ]  # fmt: skip
    return found


def _why(key: str, rows: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    if key == "host-allocation" and (row := rows.get((ALLOCATED, "every page written"))):
        return f"nothing is written; with a byte in every page {digits(row['ours'])} ms"
    if key == "host-copies":
        row = rows[COPIED, "numpy"]
        return f"{2 * MEGABYTES / row['ours']:.1f} GB/s read and written, one thread"
    if key == "host-locks":
        return "Python's own lock, which nobody else wants; the study's are of shared surfaces"
    return "float32, one thread"


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    rows = record["rows"]
    published = {where: key for key, where in ANSWERS.items()}
    in_ms = [row for row in rows if row.get("unit", UNIT) == UNIT and row["what"] != STEP]
    calls = [row for row in rows if row.get("unit") == "us"]
    steps = [row for row in rows if row["what"] == STEP]
    parts = [
        "## What a step asks for",
        markdown(
            ["", "ms", "p20-p80", "n", "the study, ms"],
            [
                [*_figures(row), _published(published.get((row["what"], row["by"])))]
                for row in in_ms
            ],
        ),
        "Together, one after another, on one thread. The study's total is under 4 ms of 169; its "
        "allocation is under 0.1 ms. Allocating writes nothing: a buffer's pages come when they "
        "are written, and cost then.",
    ]  # fmt: skip
    if calls:
        parts += [
            "## What a call costs Python",
            markdown(["", "us", "p20-p80", "n"], [_figures(row) for row in calls]),
            f"{CALLS:,} calls back to back. An operation of torch adds one number to one number; "
            "the CPU engine's program is asked for a number it knows. On a GPU nothing is waited "
            "for.",
        ]
    if steps:
        lines = [[row["case"], *_figures(row)[1:], f"{row['of_never']:.3f}x"] for row in steps]
        parts += [
            "## Asking for the loss after each step",
            markdown(["", "ms a step", "p20-p80", "n", "of never"], lines),
            "`loss.item()` waits for the device; on a CPU there is nothing to be waited for.",
        ]
    return document(record, "What the host takes beside arithmetic, on", *parts)


def _published(key: str | None) -> str:
    return "-" if key is None else f"{PUBLISHED[key].values['ms']:g}"


def _figures(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['what']}, {row['by']}", digits(row["ours"]), spread(row),
        str(row["n"]),
    ]  # fmt: skip


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Milliseconds of what a step asks for, ours and the study's."""
    rows = {(row["what"], row["by"]): row for row in record["rows"]}
    there = {key: rows[where] for key, where in ANSWERS.items() if where in rows}
    return plots.bars(
        f"What the host takes in a step, {record['device']}",
        {
            "here": {row["what"]: row["ours"] for row in there.values()},
            "the study, an M1 Pro": {
                row["what"]: float(PUBLISHED[key].values["ms"]) for key, row in there.items()
            },
        },
        "ms", "", across=True, log="x",
    )  # fmt: skip
