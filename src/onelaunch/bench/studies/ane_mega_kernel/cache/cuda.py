"""cache on a GPU: Triton's store of the CUDA engine's kernels, one launch a stage.

A kernel has no weights in it: they are its arguments. So the study's question is asked of other
weights in the place of an update, and the answer is another. `ours` is seconds until the first
logits of an engine are there; its process's start, imports and opening the device are not counted.
Logits that have not the very bits of the first engine's are wrong ones.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.children import together
from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.tables import digits
from onelaunch.bench.studies.ane_mega_kernel.cache import cases
from onelaunch.bench.studies.ane_mega_kernel.cache.programs import Told
from onelaunch.errors import RunFailed

KERNELS = "kernels"
NAME = "the CUDA engine's kernels"
CUT = f"{cases.DAMAGED}, half a kernel"
CUT_LAUNCHER = f"{cases.DAMAGED}, half a library"
CHILD = (sys.executable, "-m", "onelaunch.bench.studies.ane_mega_kernel.cache.cuda_child")
REASONS = {
    "cache-key": (
        cases.OTHER,
        "across processes, by Triton: of sources, constants, options and its own version; weights "
        "are arguments, and no part of it",
    ),
    "cache-weight-free": (
        cases.OTHER_UPDATED,
        "every kernel is one: other weights, the same kernels",
    ),
}
PATIENCE_SECONDS = 120.0
REPEATS = 2
MOST_APART = 0.05
"""Of logits in bfloat16 from PyTorch's."""
ABOUT = (
    "Seconds until the first logits of a new engine (stories15m, one text of 64 tokens, bfloat16, "
    "one launch a stage): weights packed, kernels and what launches them, in C, compiled or read, "
    "everything launched once. A process's start, imports and opening the device are not counted. "
    "Read is of Triton's store on disk, of kernels; in the same process it is not asked again. Of "
    "the kernels the largest is damaged, and of the libraries that launch them."
)
STUDY = (
    "The study: kept by hashes of program, options and weights, across processes; one without "
    "weights a hit, one with weights a miss after every update. It gives no times. Here every "
    "kernel is one without weights. Triton does not verify what it reads; for its own kernels this "
    "package does, by digests that it puts there."
)


@dataclass(frozen=True)
class _Kept:
    """What the first process said: how many kernels a forward has, the digest of each seed's
    logits, and how far the first's are from PyTorch's."""

    kernels: int
    digests: Mapping[int, str]
    apart: float


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows. Raises RunFailed where an engine gives wrong logits, or none, with
    nothing damaged and nothing kept."""
    with tempfile.TemporaryDirectory(prefix="onelaunch-cache-") as name:
        yield from _rows(Path(name), device, quick)


def _rows(folder: Path, device: str, quick: bool) -> Iterator[Row]:
    store = folder / "kept"
    (first,) = _processes([store], device, [0, 0, 1])
    kept = _read(first)
    cold = [first[0]]
    if not quick:
        cold += _processes([folder / "empty"], device, [0])[0]
    yield _row(kept, cases.EMPTY, cases.MISS, cold)
    yield _row(kept, cases.SAME, cases.HIT, [first[1]], in_memory=True)
    yield _row(kept, cases.UPDATED, cases.HIT, [first[2]], seed=1, in_memory=True)
    repeats = 1 if quick else REPEATS
    others = [_processes([store], device, [0])[0][0] for _ in range(repeats)]
    yield _row(kept, cases.OTHER, cases.HIT, others)
    (updated,) = _processes([store], device, [1])
    yield _row(kept, cases.OTHER_UPDATED, cases.HIT, updated, seed=1)
    if not quick:
        yield _at_once(kept, folder / "at once", device)
    damaged = {CUT: triton_store.binaries, CUT_LAUNCHER: triton_store.launchers}
    for what, of in damaged.items():
        if of(store):
            yield _damaged(kept, store, device, what, of)


def _processes(folders: Sequence[Path], device: str, seeds: Sequence[int]) -> list[list[Told]]:
    """What a process for each folder says of an engine for each seed; one that died says why."""
    command = [*CHILD, cases.MODEL, device, *map(str, seeds)]
    ended = together(
        [command] * len(folders),
        [triton_store.environment(each) for each in folders],
        PATIENCE_SECONDS,
    )
    return [each.told or [_died(each.seconds, each.reason)] * len(seeds) for each in ended]


def _died(seconds: float, reason: str) -> Told:
    return {
        "seconds": seconds, "compilations": 0, "hits": 0, "digest": "", "apart": None,
        "error": f"the process {reason}",
    }  # fmt: skip


def _read(first: list[Told]) -> _Kept:
    """Of the first process. Raises RunFailed where others could not be held against it."""
    for told in first:
        if told["error"]:
            raise RunFailed(f"nothing kept, nothing damaged: {told['error']}")
        if told["apart"] is None or told["apart"] > MOST_APART:
            raise RunFailed(f"nothing damaged, and {_logits(told)}")
    if not first[0]["compilations"]:
        raise RunFailed("nothing kept, and Triton compiled nothing")
    digests = {0: first[0]["digest"], 1: first[2]["digest"]}
    return _Kept(first[0]["compilations"], digests, first[0]["apart"])


def _row(
    kept: _Kept, what: str, expected: str, told: list[Told], seed: int = 0, in_memory: bool = False
) -> Row:
    """`in_memory`: what is a hit there is not read again."""
    read = 0 if in_memory else kept.kernels
    wanted = (read, 0) if expected == cases.HIT else (0, kept.kernels)
    row = Row.of(f"{NAME}, {what}", [each["seconds"] for each in told])
    answers = _answers(kept, told, seed)
    row.notes = {
        "kind": KERNELS, "what": what, "expected": expected,
        "found": _found(told, answers),
        "as_expected": answers["wrong"] == answers["failed"] == 0
        and all((each["hits"], each["compilations"]) == wanted for each in told),
        "compilations": sum(each["compilations"] for each in told), "kernels": kept.kernels,
        "errors": [each["error"] for each in told if each["error"]], **answers,
    }  # fmt: skip
    return row


def _at_once(kept: _Kept, folder: Path, device: str) -> Row:
    """Nobody waits for the other: both may compile. A third process then finds every kernel."""
    told = [each[0] for each in _processes([folder, folder], device, [0])]
    there = triton_store.entries(folder)
    ((third,),) = _processes([folder], device, [0])
    row = _row(kept, cases.AT_ONCE, cases.MISS, told)
    after = _row(kept, cases.OTHER, cases.HIT, [third])
    right = row.notes["wrong"] == row.notes["failed"] == 0
    row.notes |= {
        "expected": "whole entries",
        "found": f"{row.notes['found']}; {there} kept; a third process: {after.notes['found']}",
        "as_expected": right and there == kept.kernels and after.notes["as_expected"],
    }
    return row


def _damaged(
    kept: _Kept, store: Path, device: str, what: str, of: Callable[[Path], list[Path]]
) -> Row:
    """The first of some files cut in half in a copy of a store. One whose code is another is not
    tried: where it is not found out it may write anywhere, and never end."""
    with tempfile.TemporaryDirectory(dir=store.parent) as name:
        copy = triton_store.copied(store, Path(name) / "copy")
        path = of(copy)[0]
        triton_store.cut(path)
        content = path.read_bytes()
        ((told,),) = _processes([copy], device, [0])
        still = path.is_file() and path.read_bytes() == content
    row = _row(kept, what, cases.MISS, [told])
    anew = not still and told["compilations"] == (what == CUT)
    row.notes |= {
        "found": f"{row.notes['found']}; {'damaged still' if still else 'whole again'}",
        "as_expected": anew and row.notes["wrong"] == row.notes["failed"] == 0,
        "outcomes": [f"{path.stem}, {len(content):,} bytes: {_outcome(told, kept)}"],
    }
    return row


def _outcome(told: Told, kept: _Kept) -> str:
    """Of an engine with a damaged kernel, in words."""
    if told["error"]:
        return str(told["error"])
    if told["digest"] == kept.digests[0]:
        return "the same logits"
    return f"{_logits(told)}, undamaged {kept.apart:.2%}"


def _logits(told: Told) -> str:
    apart = told["apart"]
    return "logits that are no numbers" if apart is None else f"logits {apart:.2%} from PyTorch's"


def _answers(kept: _Kept, told: list[Told], seed: int) -> dict[str, Any]:
    """How many gave wrong logits, or none."""
    given = [each for each in told if not each["error"]]
    wrong = [each for each in given if each["digest"] != kept.digests[seed]]
    return {"wrong": len(wrong), "failed": len(told) - len(given)}


def _found(told: list[Told], answers: dict[str, Any]) -> str:
    """A row's answer in a line."""
    hits, compilations = (sum(each[name] for each in told) for name in ("hits", "compilations"))
    parts = [f"{hits} read, {compilations} compiled"]
    if answers["wrong"]:
        parts.append(f"{answers['wrong']} of {len(told)} with wrong logits")
    if answers["failed"]:
        parts.append(f"{answers['failed']} of {len(told)} failed")
    return ", ".join(parts)


def is_of_kernels(record: dict[str, Any]) -> bool:
    """Whether a record was made on a GPU."""
    return any(row.get("kind") == KERNELS for row in record["rows"])


def details(record: dict[str, Any]) -> list[str]:
    """Of a table: what became of each damaged kernel, and why what failed did."""
    found = []
    for row in record["rows"]:
        each = row.get("outcomes") or row["errors"]
        if each:
            found.append("\n".join([f"{row['case']}:", "", *(f"- {line}" for line in each)]))
    return found


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of each statement about what is kept."""
    rows = {row["what"]: row for row in record["rows"] if row["kind"] == KERNELS}
    cold = rows.get(cases.EMPTY)
    found = []
    for key, (what, why) in REASONS.items():
        if (row := rows.get(what)) and cold:
            why += f"; compiling takes {digits(cold['ours'])} s"
            found.append(cases.finding(key, _figures(row), row["as_expected"], why))
    if row := rows.get(cases.UPDATED):
        why = "Triton's store is not asked: a kernel is read or compiled"
        found.append(cases.finding("cache-exists", "", None, why))
        why = "no kernel has weights in it: after an update there is nothing to be compiled"
        found.append(cases.finding("cache-weights", _figures(row), None, why))
    damaged = [rows[what] for what in (CUT, CUT_LAUNCHER) if what in rows]
    if damaged:
        outcomes = [line for row in damaged for line in row["outcomes"]]
        found.append(
            Finding(
                (),
                "a damaged entry is found out and compiled anew",
                "not measured",
                "; ".join(row["found"] for row in damaged),
                "confirmed" if all(row["as_expected"] for row in damaged) else "refuted",
                f"{'; '.join(outcomes)}; by the digests that this package puts into Triton's "
                "store, which does not verify what it reads",
            )
        )
    return found


def _figures(row: dict[str, Any]) -> str:
    return f"{row['found']}, {digits(row['ours'] * 1e3)} ms"
