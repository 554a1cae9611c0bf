"""cache: what the store of compiled programs saves, and that it never serves a wrong one.

The published study found that Apple's compiler keeps programs by hashes of program, options and
weights, across processes, so that a program without weights is found again and one with weights
never after an update. The same asked of this package's store: of ML Programs (one layer, and its
attention, which has no weights) and of the CPU engine's object code, which serves any weights. On a
GPU it is asked of Triton's store of the CUDA engine's kernels, see cuda.py. `ours` is seconds
until the program is there; imports and the start of a process are not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.core.findings import NEEDS_A_MAC, Finding
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.tables import digits, document, markdown, spread
from onelaunch.bench.studies.ane_mega_kernel.cache import cases
from onelaunch.bench.studies.ane_mega_kernel.cache.programs import (
    ATTENTION,
    CPU,
    LAYER,
    Case,
    Told,
    damage,
    elsewhere,
)
from onelaunch.engines.coreml import coremltools
from onelaunch.errors import MissingExtra

UNIT = "s"
REPEATS, QUICK_REPEATS = 7, 3
CPU_REPEATS, QUICK_CPU_REPEATS = 2, 1
"""Of compiling the CPU engine's program, a quarter of a minute each."""
NAMES = {
    LAYER: "ML Program of a layer",
    ATTENTION: "ML Program of attention",
    CPU: "the CPU engine's program",
}


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case of what can be compiled here, or on a GPU of its kernels; yields rows."""
    if torch.device(device).type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.cache import cuda as cache_cuda

        yield from cache_cuda.run(device, quick, say)
        return
    repeats = QUICK_REPEATS if quick else REPEATS
    missing: MissingExtra | None = None
    try:
        coremltools("bench cache")
    except MissingExtra as error:
        missing = error
        say(f"without ML Programs: {error}")
    else:
        yield from _layer(repeats)
        yield from _attention(repeats)
    from onelaunch.engines.cpu import why_not

    if reason := why_not():
        say(f"without the CPU engine: {reason}")
        if missing:
            raise missing
    else:
        yield from _cpu(QUICK_CPU_REPEATS if quick else CPU_REPEATS, quick)


def _layer(repeats: int) -> Iterator[Row]:
    with _folder() as name:
        folder = Path(name)
        case = Case(cases.MODEL, LAYER, 0)
        cold = []
        for seed in range(repeats):  # other weights each time: nothing of it is kept
            cold.append(Case(cases.MODEL, LAYER, seed).get(folder))
        yield _row(LAYER, cases.EMPTY, cases.MISS, cold)
        yield _row(LAYER, cases.SAME, cases.HIT, [case.get(folder) for _ in range(repeats)])
        yield _asked(LAYER, [case.ask(folder) for _ in range(repeats)])
        yield _row(LAYER, cases.OTHER, cases.HIT, elsewhere(folder, cases.MODEL, LAYER, [0]))
        updated = [Case(cases.MODEL, LAYER, repeats + n).get(folder) for n in range(repeats)]
        yield _row(LAYER, cases.UPDATED, cases.MISS, updated)
        yield from _damaged(LAYER, case, repeats)
    with _folder() as name:
        at_once = elsewhere(Path(name), cases.MODEL, LAYER, [0, 0])
        yield _at_once(LAYER, at_once, case.get(Path(name)))


def _attention(repeats: int) -> Iterator[Row]:
    cold = []
    for _ in range(repeats):
        with _folder() as name:
            cold.append(Case(cases.MODEL, ATTENTION, 0).get(Path(name)))
    yield _row(ATTENTION, cases.EMPTY, cases.MISS, cold)
    with _folder() as name:
        folder = Path(name)
        Case(cases.MODEL, ATTENTION, 0).get(folder)
        updated = [Case(cases.MODEL, ATTENTION, n + 1).get(folder) for n in range(repeats)]
        yield _row(ATTENTION, cases.UPDATED, cases.HIT, updated)
        other = elsewhere(folder, cases.MODEL, ATTENTION, [1])
        yield _row(ATTENTION, cases.OTHER_UPDATED, cases.HIT, other)


def _cpu(repeats: int, quick: bool) -> Iterator[Row]:
    case = Case(cases.MODEL, CPU, 0)
    with _folder() as name:
        folders = [Path(name) / str(number) for number in range(repeats)]
        yield _row(CPU, cases.EMPTY, cases.MISS, [case.get(folder) for folder in folders])
        folder = folders[0]
        yield _row(CPU, cases.SAME, cases.HIT, [case.get(folder) for _ in range(3)])
        yield _row(CPU, cases.OTHER, cases.HIT, elsewhere(folder, cases.MODEL, CPU, [0]))
        if not quick:
            yield from _damaged(CPU, case, 1)
    if not quick:
        with _folder() as name:
            at_once = elsewhere(Path(name), cases.MODEL, CPU, [0, 0])
            yield _at_once(CPU, at_once, case.get(Path(name)))


def _damaged(kind: str, case: Case, repeats: int) -> Iterator[Row]:
    """A byte changed in the only entry; then it is compiled and kept anew."""
    found, after = [], []
    for _ in range(repeats):
        with _folder() as name:
            folder = Path(name)
            case.get(folder)
            damage(folder)
            found.append(case.get(folder))
            after.append(case.get(folder))
    row = _row(kind, cases.DAMAGED, cases.MISS, found)
    row.notes["as_expected"] &= all(each["damaged"] == 1 for each in found)
    row.notes["damaged"] = sum(each["damaged"] for each in found)
    yield row
    yield _row(kind, cases.REPAIRED, cases.HIT, after)


def _at_once(kind: str, told: list[Told], after: Told) -> Row:
    """Nobody waits for the other: both may compile. What is kept is one whole entry."""
    row = Row.of(f"{NAMES[kind]}, {cases.AT_ONCE}", [each["seconds"] for each in told])
    compilations = sum(each["compilations"] for each in told)
    whole = after["hits"] == after["entries"] == 1 and not after["damaged"]
    row.notes = {
        "kind": kind, "what": cases.AT_ONCE, "expected": "one whole entry",
        "found": f"{compilations} compiled, {after['entries']} kept",
        "as_expected": whole, "compilations": compilations,
    }  # fmt: skip
    return row


def _asked(kind: str, told: list[Told]) -> Row:
    row = Row.of(f"{NAMES[kind]}, {cases.ASKED}", [each["seconds"] for each in told])
    yes = all(each["there"] for each in told)
    row.notes = {
        "kind": kind, "what": cases.ASKED, "expected": "yes", "found": "yes" if yes else "no",
        "as_expected": yes, "compilations": 0,
    }  # fmt: skip
    return row


def _row(kind: str, what: str, expected: str, told: list[Told]) -> Row:
    row = Row.of(f"{NAMES[kind]}, {what}", [each["seconds"] for each in told])
    hits = sum(each["hits"] for each in told)
    compilations = sum(each["compilations"] for each in told)
    wanted = (len(told), 0) if expected == cases.HIT else (0, len(told))
    row.notes = {
        "kind": kind, "what": what, "expected": expected,
        "found": f"{hits} of {len(told)} kept, {compilations} compiled",
        "as_expected": (hits, compilations) == wanted, "compilations": compilations,
    }  # fmt: skip
    return row


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="onelaunch-cache-")


ANSWERS = {
    "cache-key": (LAYER, cases.OTHER), "cache-exists": (LAYER, cases.ASKED),
    "cache-weight-free": (ATTENTION, cases.OTHER_UPDATED), "cache-weights": (LAYER, cases.UPDATED),
}  # fmt: skip


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of each statement about what is kept."""
    from onelaunch.bench.studies.ane_mega_kernel.cache import cuda as cache_cuda

    if cache_cuda.is_of_kernels(record):
        return cache_cuda.findings(record)
    rows = {(row["kind"], row["what"]): row for row in record["rows"]}
    found = []
    for key, (kind, what) in ANSWERS.items():
        row, cold = rows.get((kind, what)), rows.get((kind, cases.EMPTY))
        if row is None or cold is None:
            continue
        why = (
            f"this package's store, {NAMES[kind]}; compiling takes {digits(cold['ours'] * 1e3)} "
            f"ms; Apple's own store {NEEDS_A_MAC}"
        )
        ours = f"{row['found']}, {digits(row['ours'] * 1e3)} ms"
        found.append(cases.finding(key, ours, row["as_expected"], why))
    return found


ABOUT = (
    "Until the program is there: asked for, and compiled where it must be, or read, every byte "
    "verified; asking hashes the weights. A process's start and imports are not counted."
)
STUDY = (
    "The study: kept by hashes of program, options and weights, across processes; one without "
    "weights a hit, one with weights a miss after every update. It gives no times. Two processes "
    "at once do not wait for each other: both compile, and one entry is kept."
)


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    from onelaunch.bench.studies.ane_mega_kernel.cache import cuda as cache_cuda

    of_kernels = cache_cuda.is_of_kernels(record)
    rows = record["rows"]
    cold = {row["kind"]: row["ours"] for row in rows if row["what"] == cases.EMPTY}
    lines = []
    for row in rows:
        times = cold.get(row["kind"], row["ours"]) / row["ours"]
        no_times = row["what"] == cases.EMPTY or row.get("failed")
        lines.append(
            [
                row["case"], digits(row["ours"] * 1e3),
                spread(row, scale=1e3), str(row["n"]),
                "-" if no_times else f"{times:,.1f}x", row["expected"], row["found"],
                "yes" if row["as_expected"] else "no",
            ]
        )  # fmt: skip
    parts = [
        cache_cuda.ABOUT if of_kernels else ABOUT,
        markdown(
            ["", "ms", "p20-p80", "n", "of compiling", "expected", "found", "as expected"], lines
        ),
        *(cache_cuda.details(record) if of_kernels else ()),
        cache_cuda.STUDY if of_kernels else STUDY,
    ]
    return document(record, "The store of compiled programs, on", *parts)
