"""cache: what the store of compiled programs saves, and that it never serves a wrong one.

The published study found that Apple's compiler keeps programs by hashes of program, options and
weights, across processes, so that a program without weights is a hit and one with weights a miss
after every update. The same measured of this package's store: of ML Programs (one layer, and its
attention, which has no weights) and of the CPU engine's object code, which serves any weights. On a
GPU it is measured of Triton's store of the CUDA engine's kernels, see cuda.py. `ours` is seconds
until the program is there; imports and the start of a process are not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.studies.ane_mega_kernel.cache import views
from onelaunch.bench.studies.ane_mega_kernel.cache.programs import (
    MODEL,
    Case,
    Result,
    damage,
    in_processes,
)
from onelaunch.bench.studies.ane_mega_kernel.cache.views import (
    ATTENTION,
    CPU,
    HIT,
    LAYER,
    MISS,
    findings,
    table,
)
from onelaunch.engines.coreml import coremltools
from onelaunch.errors import MissingExtra

__all__ = ["UNIT", "findings", "run", "table"]

UNIT = "s"
REPEATS, QUICK_REPEATS = 7, 3
CPU_REPEATS, QUICK_CPU_REPEATS = 2, 1
"""Of compiling the CPU engine's program, a quarter of a minute each."""


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case of what can be compiled here, or on a GPU of its kernels; yields rows."""
    if torch.device(device).type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.cache import cuda

        yield from cuda.run(device, quick)
        return
    repeats = QUICK_REPEATS if quick else REPEATS
    missing: MissingExtra | None = None
    try:
        coremltools("bench cache")
    except MissingExtra as error:
        missing = error
        log(f"without ML Programs: {error}")
    else:
        yield from _layer(repeats)
        yield from _attention(repeats)
    from onelaunch.engines.cpu import why_not

    if reason := why_not():
        log(f"without the CPU engine: {reason}")
        if missing:
            raise missing
    else:
        yield from _cpu(QUICK_CPU_REPEATS if quick else CPU_REPEATS, quick)


def _layer(repeats: int) -> Iterator[Row]:
    case = Case(MODEL, LAYER, 0)
    with _folder() as name:
        folder = Path(name)
        # other weights each time: nothing of it is kept
        cold = [Case(MODEL, LAYER, seed).get(folder) for seed in range(repeats)]
        yield _row(LAYER, views.EMPTY, MISS, cold)
        yield _row(LAYER, views.SAME, HIT, [case.get(folder) for _ in range(repeats)])
        yield _contained([case.contains(folder) for _ in range(repeats)])
        yield _row(LAYER, views.OTHER, HIT, in_processes(folder, MODEL, LAYER, [0]))
        seeds = range(repeats, 2 * repeats)
        updated = [Case(MODEL, LAYER, seed).get(folder) for seed in seeds]
        yield _row(LAYER, views.UPDATED, MISS, updated)
    yield from _damaged(case, repeats)
    yield _at_once(case)


def _attention(repeats: int) -> Iterator[Row]:
    cold = []
    for _ in range(repeats):
        with _folder() as name:
            cold.append(Case(MODEL, ATTENTION, 0).get(Path(name)))
    yield _row(ATTENTION, views.EMPTY, MISS, cold)
    with _folder() as name:
        folder = Path(name)
        Case(MODEL, ATTENTION, 0).get(folder)
        updated = [Case(MODEL, ATTENTION, n + 1).get(folder) for n in range(repeats)]
        yield _row(ATTENTION, views.UPDATED, HIT, updated)
        other = in_processes(folder, MODEL, ATTENTION, [1])
        yield _row(ATTENTION, views.OTHER_UPDATED, HIT, other)


def _cpu(repeats: int, quick: bool) -> Iterator[Row]:
    case = Case(MODEL, CPU, 0)
    with _folder() as name:
        folders = [Path(name) / str(number) for number in range(repeats)]
        yield _row(CPU, views.EMPTY, MISS, [case.get(folder) for folder in folders])
        yield _row(CPU, views.SAME, HIT, [case.get(folders[0]) for _ in range(3)])
        yield _row(CPU, views.OTHER, HIT, in_processes(folders[0], MODEL, CPU, [0]))
    if not quick:
        yield from _damaged(case, 1)
        yield _at_once(case)


def _damaged(case: Case, repeats: int) -> Iterator[Row]:
    """A byte changed in the only entry; then it is compiled and kept anew."""
    damaged, after = [], []
    for _ in range(repeats):
        with _folder() as name:
            folder = Path(name)
            case.get(folder)
            damage(folder)
            damaged.append(case.get(folder))
            after.append(case.get(folder))
    row = _row(case.kind, views.DAMAGED, MISS, damaged)
    row.notes["as_expected"] &= all(each["damaged"] == 1 for each in damaged)
    row.notes["damaged"] = sum(each["damaged"] for each in damaged)
    yield row
    yield _row(case.kind, views.REPAIRED, HIT, after)


def _at_once(case: Case) -> Row:
    """Two processes do not wait for each other: both may compile. One whole entry is kept."""
    with _folder() as name:
        results = in_processes(Path(name), MODEL, case.kind, [0, 0])
        after = case.get(Path(name))
    row = _row(case.kind, views.AT_ONCE, "one whole entry", results)
    whole = after["hits"] == after["entries"] == 1 and not after["damaged"]
    found = f"{row.notes['compilations']} compiled, {after['entries']} kept"
    row.notes |= {"found": found, "as_expected": whole}
    return row


def _contained(results: list[Result]) -> Row:
    row = _row(LAYER, views.LOOKED_UP, "yes", results)
    yes = all(each["there"] for each in results)
    row.notes |= {"found": "yes" if yes else "no", "as_expected": yes}
    return row


def _row(kind: str, what: str, expected: str, results: list[Result]) -> Row:
    row = Row.of(f"{views.NAMES[kind]}, {what}", [each["seconds"] for each in results])
    n = len(results)
    hits, compilations = (sum(each[key] for each in results) for key in ("hits", "compilations"))
    row.notes = {
        "kind": kind, "what": what, "expected": expected,
        "found": f"{hits} of {n} kept, {compilations} compiled",
        "as_expected": (hits, compilations) == ((n, 0) if expected == HIT else (0, n)),
        "compilations": compilations,
    }  # fmt: skip
    return row


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="onelaunch-cache-")
