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
from collections.abc import Iterator
from pathlib import Path

import torch

from onelaunch.bench.core.children import ask
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.rows import (
    AGAIN,
    DISTINCT,
    QUICK_AGAIN,
    QUICK_DISTINCT,
    RESTARTS,
    many_row,
    restart_row,
)
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.views import draw, findings, table
from onelaunch.engines.coreml import coremltools

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "s"
LAYERS = (12, 24, 48, 96, 192)
QUICK_LAYERS = (12,)
CHILD = (sys.executable, "-m", "onelaunch.bench.studies.ane_mega_kernel.compile_budget.child")


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    if torch.device(device).type == "cuda":
        from onelaunch.bench.studies.ane_mega_kernel.compile_budget import (
            cuda as compile_budget_cuda,
        )

        yield from compile_budget_cuda.run(device, quick, say)
        return
    coremltools("bench compile-budget")
    for what, count in (
        ("again", QUICK_AGAIN if quick else AGAIN),
        ("distinct", QUICK_DISTINCT if quick else DISTINCT),
    ):
        yield _many(what, count)
    yield _restart(2 if quick else RESTARTS)
    for layers in QUICK_LAYERS if quick else LAYERS:
        row = _layers(layers)
        yield row
        if row.notes["refused"]:
            break


def _many(what: str, count: int) -> Row:
    case = f"{count} compilations, {'new weights' if what == 'again' else 'distinct shapes'}"
    return many_row(case, ask((*CHILD, what, str(count))))


def _restart(count: int) -> Row:
    return restart_row([ask((*CHILD, "restart")) for _ in range(count)])


def _layers(layers: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        words = "layers", str(layers), str(Path(folder) / "whole.mlpackage")
        told = ask((*CHILD, *words))
    notes = {name: told[name] for name in ("refused", "weight_bytes", "operations")}
    row = Row(f"{layers} layers of 768/2048 in a program", told["seconds"], notes=notes)
    return row
