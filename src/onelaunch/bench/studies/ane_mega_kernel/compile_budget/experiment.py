"""compile-budget: whether a process can only compile so many times.

A trainer of the published study began a fresh process after 72 compilations, as more were thought
to fail; the study made 312 in one, then 150 distinct ones, without a failure. The same here with ML
Programs: compiled again and again for new weights, then of 150 shapes; seconds and memory by
number; what a fresh process costs; and how many layers one program may have until it is refused.
The same on a GPU with Triton's kernels: cuda.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.record import Row
from onelaunch.bench.core.tables import figure as digits
from onelaunch.bench.core.tables import markdown, provenance
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.rows import (
    AGAIN,
    DISTINCT,
    QUICK_AGAIN,
    QUICK_DISTINCT,
    RESTARTS,
    child,
    many_row,
    restart_row,
)
from onelaunch.engines.coreml import coremltools
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = "s"
LAYERS = (12, 24, 48, 96, 192)
QUICK_LAYERS = (12,)
CHILD = (sys.executable, "-m", "onelaunch.bench.studies.ane_mega_kernel.compile_budget.child")


def run(device: str, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Every case; yields rows."""
    if torch.device(device).type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.compile_budget import (
            cuda as compile_budget_cuda,
        )

        yield from compile_budget_cuda.run(device, quick, say)
        return
    if torch.device(device).type != "cpu":
        raise BadInput(f"compile-budget: --device {device}: programs are made on the CPU")
    coremltools("bench compile-budget")
    for what, count in (
        ("again", QUICK_AGAIN if quick else AGAIN),
        ("distinct", QUICK_DISTINCT if quick else DISTINCT),
    ):
        yield _many(what, count, say)
    yield _restart(2 if quick else RESTARTS, say)
    for layers in QUICK_LAYERS if quick else LAYERS:
        row = _layers(layers, say)
        yield row
        if row.notes["refused"]:
            break


def _many(what: str, count: int, say: Callable[[str], None]) -> Row:
    case = f"{count} compilations, {'new weights' if what == 'again' else 'distinct shapes'}"
    return many_row(case, child((*CHILD, what, str(count))), say)


def _restart(count: int, say: Callable[[str], None]) -> Row:
    return restart_row([child((*CHILD, "restart")) for _ in range(count)], say)


def _layers(layers: int, say: Callable[[str], None]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        words = "layers", str(layers), str(Path(folder) / "whole.mlpackage")
        told = child((*CHILD, *words))
    notes = {name: told[name] for name in ("refused", "weight_bytes", "operations")}
    row = Row(f"{layers} layers of 768/2048 in a program", told["seconds"], notes=notes)
    answer = f"refused: {told['refused']}" if told["refused"] else "made"
    say(f"{row.case}: {row.ours:.1f} s, {told['weight_bytes'] / 1e6:,.0f} MB; {answer}")
    return row


def findings(record: dict[str, Any]) -> list[Finding]:
    """Failures, a restart's price, and how large a program may be."""
    from onelaunch.bench.studies.ane_mega_kernel.compile_budget import cuda as compile_budget_cuda

    if compile_budget_cuda.is_of_kernels(record):
        return compile_budget_cuda.findings(record)
    rows = {row["case"]: row for row in record["rows"]}
    found = []
    for key, published in (("budget-312", AGAIN), ("budget-150", DISTINCT)):
        kind = "new weights" if published == AGAIN else "distinct shapes"
        row = next((r for c, r in rows.items() if c.endswith(kind)), None)
        if row is None:
            continue
        slower, fewer = row["last_tenth"] / row["first_tenth"], row["n"] < published
        found.append(
            Finding(
                (key, "budget-252") if published == AGAIN else (key,),
                f"{published} compilations in one process do not fail",
                f"{published}, none failed",
                f"{row['n']}, {row['failures'] or 'none'} failed",
                "refuted" if row["failures"] else "quick run" if fewer else "confirmed",
                f"the last tenth took {slower:.2f} times the first's time; "
                f"{row['bytes_a_compilation'] / 1e3:+.1f} kB each",
            )
        )
    if row := rows.get("a fresh process"):
        found.append(
            Finding(
                ("budget-restart",),
                "a restart costs seconds, so a budget is to be avoided",
                "about 1.7 s",
                f"{row['ours']:.2f} s",
                "confirmed" if row["ours"] > 0.5 else "refuted",
                "a process that imports coremltools and compiles once, less a compilation",
                row["ours"] / 1.7,
            )
        )
    layers = [row for row in rows.values() if "refused" in row]
    if made := [row for row in layers if not row["refused"]]:
        most = max(made, key=lambda row: row["weight_bytes"])
        refused = next((row["refused"] for row in layers if row["refused"]), "none was refused")
        found.append(
            Finding(
                ("sram",),
                "162 MB of weights in one program meet no limit",
                "162 MB",
                f"{most['weight_bytes'] / 1e6:,.0f} MB",
                "not applicable",
                f"made and saved; whether a Neural Engine runs it, a Mac would show; {refused}",
            )
        )
    return found


ABOUT = "ML Programs of one layer of stories260k, forward, emitted, converted and saved."
LAST = (
    "Memory is what the system counts for the process; its growth is over the second half of "
    "the compilations. The study: 312 and 150 without a failure, about 1.7 s a restart."
)
LAYERS_END = (
    "What is refused is so by this package's own check of a saved program; coremltools wrote it."
)


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    from onelaunch.bench.studies.ane_mega_kernel.compile_budget import cuda as on_gpu

    of_kernels = on_gpu.is_of_kernels(record)
    rows = record["rows"]
    many = [row for row in rows if "failures" in row]
    layers = [row for row in rows if "refused" in row]
    parts = [
        f"# Compilations in one process, on {record['device']}",
        provenance(record),
        on_gpu.ABOUT if of_kernels else ABOUT,
        markdown(
            ["", "failed", "s (median)", "first tenth", "last tenth", "MB before", "MB after",
             "kB a compilation"],
            [
                [
                    row["case"], str(row["failures"]), f"{row['ours']:.3f}",
                    f"{row['first_tenth']:.3f}", f"{row['last_tenth']:.3f}",
                    f"{row['bytes_before'] / 1e6:,.0f}", f"{row['bytes_after'] / 1e6:,.0f}",
                    f"{row['bytes_a_compilation'] / 1e3:+,.1f}",
                ]
                for row in many
            ],
        ),
        *(on_gpu.memory_table(many) if of_kernels else ()),
        on_gpu.LAST if of_kernels else LAST,
    ]  # fmt: skip
    parts += [
        f"A fresh process takes {digits(row['ours'])} s more than a compilation in an old one."
        for row in rows
        if row["case"] == "a fresh process"
    ]
    if layers:
        parts += [
            f"## How many layers a {'launch' if of_kernels else 'program'} may have",
            markdown(
                ["", "s", "MB of weights", "stages" if of_kernels else "operations", ""],
                [
                    [
                        row["case"], digits(row["ours"]), f"{row['weight_bytes'] / 1e6:,.0f}",
                        f"{row['operations']:,}", row["refused"] or "made",
                    ]
                    for row in layers
                ],
            ),
            on_gpu.LAYERS_END if of_kernels else LAYERS_END,
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any]) -> Figure | None:
    """Memory by number, the GPU's too."""
    from onelaunch.bench.core import plots

    many = [row for row in record["rows"] if "bytes_by_number" in row]
    if not many:
        return None
    figure = plots.new_figure(7, 4)
    axes = figure.subplots()
    for row, key, where in (
        (row, key, where)
        for row in many
        for key, where in (("bytes_by_number", ""), ("gpu_bytes_by_number", ", the GPU's"))
        if key in row
    ):
        memory = [n / 1e6 for n in row[key]]
        step = max(1, row["n"] // 50)
        axes.plot([i * step for i in range(len(memory))], memory, label=row["case"] + where)
    axes.set_xlabel("compilations")
    axes.set_ylabel("memory of the process, MB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"Compilations in one process, {record['device']}", fontsize=10)
    return figure
