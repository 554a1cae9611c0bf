"""What cache does with a store, on the CPU and on a GPU, by the names in its record; and what a
record says: the table and the study's statements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core.findings import NEEDS_A_MAC, Finding, Verdict
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import CASE, N, column, median_and_spread, statement, table_of

LAYER, ATTENTION, CPU, KERNELS = "layer", "attention", "cpu", "kernels"
"""Kinds of what is kept."""
NAMES = {
    LAYER: "ML Program of a layer",
    ATTENTION: "ML Program of attention",
    CPU: "the CPU engine's program",
    KERNELS: "the CUDA engine's kernels",
}
HIT, MISS = "hit", "miss"
EMPTY, SAME, LOOKED_UP = "nothing kept", "kept, same process", "asked whether it is kept"
OTHER, UPDATED = "kept, another process", "after an update of the weights"
OTHER_UPDATED = "after an update, another process"
AT_ONCE, DAMAGED, REPAIRED = "two processes at once", "a damaged entry", "after the damaged entry"
CUT, CUT_LAUNCHER = f"{DAMAGED}, half a kernel", f"{DAMAGED}, half a library"

CLAIMS = {
    "cache-key": "a program is kept by hashes of program, options and weights",
    "cache-exists": "the store says whether a program is kept, without reading it",
    "cache-weight-free": "one without weights is a hit in another process",
    "cache-weights": "one with weights is a miss after an update",
}
ANSWERS = {
    "cache-key": (LAYER, OTHER), "cache-exists": (LAYER, LOOKED_UP),
    "cache-weight-free": (ATTENTION, OTHER_UPDATED), "cache-weights": (LAYER, UPDATED),
}  # fmt: skip
"""By published row, the kind and the case that answer it on a CPU."""
GPU_ANSWERS = {
    "cache-key": (
        OTHER,
        "across processes, by Triton: of sources, constants, options and its own version; weights "
        "are arguments, and no part of it",
    ),
    "cache-weight-free": (
        OTHER_UPDATED,
        "every kernel is one: other weights, the same kernels",
    ),
}

ABOUT = (
    "Until the program is there: compiled where it must be, or read, every byte verified; looking "
    "it up hashes the weights. A process's start and imports are not counted."
)
STUDY = (
    "The study: kept by hashes of program, options and weights, across processes; one without "
    "weights a hit, one with weights a miss after every update. It gives no times. Two processes "
    "at once do not wait for each other: both compile, and one entry is kept."
)
GPU_ABOUT = (
    "Seconds until the first logits of a new engine (stories15m, one sequence of 64 tokens, "
    "bfloat16, one kernel per stage): weights packed, kernels and their launchers in C compiled or "
    "read, everything launched once. A process's start, imports and opening the device are not "
    "counted. Read is of Triton's store on disk, of kernels; the same process does not read it "
    "again. Of the kernels the largest is damaged, and of the libraries that launch them."
)
GPU_STUDY = (
    "The study: kept by hashes of program, options and weights, across processes; one without "
    "weights a hit, one with weights a miss after every update. It gives no times. Here every "
    "kernel is one without weights. Triton does not verify what it reads; for its own kernels this "
    "package does, by digests that it puts there."
)
Rows = dict[tuple[str, str], dict[str, Any]]


def findings(record: dict[str, Any]) -> list[Finding]:
    """A finding for each statement about what is kept."""
    rows = {(row["kind"], row["what"]): row for row in record["rows"]}
    return list(_of_kernels(rows) if _on_a_gpu(record) else _of_programs(rows))


def _on_a_gpu(record: dict[str, Any]) -> bool:
    return any(row.get("kind") == KERNELS for row in record["rows"])


def _of_programs(rows: Rows) -> Iterator[Finding]:
    for key, (kind, what) in ANSWERS.items():
        row, cold = rows.get((kind, what)), rows.get((kind, EMPTY))
        if row and cold:
            why = f"this package's store, {NAMES[kind]}; compiling takes "
            why += f"{digits(cold['ours'] * 1e3)} ms; Apple's own store {NEEDS_A_MAC}"
            yield _finding(key, _figures(row), row["as_expected"], why)


def _of_kernels(rows: Rows) -> Iterator[Finding]:
    cold = rows.get((KERNELS, EMPTY))
    for key, (what, why) in GPU_ANSWERS.items():
        if (row := rows.get((KERNELS, what))) and cold:
            why += f"; compiling takes {digits(cold['ours'])} s"
            yield _finding(key, _figures(row), row["as_expected"], why)
    if row := rows.get((KERNELS, UPDATED)):
        why = "Triton's store has no such query: a kernel is read or compiled"
        yield _finding("cache-exists", "", None, why)
        why = "no kernel has weights in it: after an update there is nothing to be compiled"
        yield _finding("cache-weights", _figures(row), None, why)
    if damaged := [rows[KERNELS, w] for w in (CUT, CUT_LAUNCHER) if (KERNELS, w) in rows]:
        outcomes = [line for row in damaged for line in row["outcomes"]]
        yield Finding(
            (),
            "a damaged entry is detected and compiled anew",
            "not measured",
            "; ".join(row["found"] for row in damaged),
            "confirmed" if all(row["as_expected"] for row in damaged) else "refuted",
            f"{'; '.join(outcomes)}; by the digests that this package puts into Triton's store, "
            "which does not verify what it reads",
        )


def _finding(key: str, ours: str, as_expected: bool | None, why: str) -> Finding:
    """The finding of one claim; None where the device has nothing of the kind."""
    verdict: Verdict = "confirmed" if as_expected else "refuted"
    if as_expected is None:
        verdict = "not applicable"
    return Finding((key,), CLAIMS[key], statement(key), ours, verdict, why)


def _figures(row: dict[str, Any]) -> str:
    return f"{row['found']}, {digits(row['ours'] * 1e3)} ms"


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown; of a GPU also what became of each damaged kernel, and why
    what failed did."""
    rows, on_a_gpu = record["rows"], _on_a_gpu(record)
    cold = {row["kind"]: row["ours"] for row in rows if row["what"] == EMPTY}

    def of_compiling(row: dict[str, Any]) -> str:
        if row["what"] == EMPTY or row.get("failed"):
            return "-"
        return f"{cold.get(row['kind'], row['ours']) / row['ours']:,.1f}x"

    outcomes = [(row["case"], row.get("outcomes") or row.get("errors")) for row in rows]
    parts = [
        GPU_ABOUT if on_a_gpu else ABOUT,
        table_of(
            rows,
            CASE,
            *median_and_spread("ms", scale=1e3),
            N,
            ("of compiling", of_compiling),
            column("expected", "expected"),
            column("found", "found"),
            ("as expected", lambda row: "yes" if row["as_expected"] else "no"),
        ),
        *("\n".join([f"{case}:", "", *(f"- {line}" for line in o)]) for case, o in outcomes if o),
        GPU_STUDY if on_a_gpu else STUDY,
    ]
    return document(record, "The store of compiled programs, on", *parts)
