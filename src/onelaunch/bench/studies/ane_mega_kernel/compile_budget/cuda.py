"""compile-budget on a GPU: Triton's kernels compiled, loaded and launched in one process, and new
weights, for which nothing is to be compiled: they are a kernel's arguments. Seconds and memory by
number, the GPU's too; what a fresh process costs; and how many layers one launch may have."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.children import ask
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.rows import (
    AGAIN,
    DISTINCT,
    KERNELS,
    QUICK_AGAIN,
    QUICK_DISTINCT,
    RESTARTS,
    WEIGHTS,
    many_row,
    restart_row,
    slope,
)

CHILD = "onelaunch.bench.studies.ane_mega_kernel.compile_budget.cuda_child"
COMMAND = (sys.executable, "-m", CHILD)
LAYERS, QUICK_LAYERS = (12, 96), (12,)
Told = Callable[[str, int], dict[str, Any]]


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    with tempfile.TemporaryDirectory(prefix="onelaunch-kernels-") as folder:
        env = triton_store.environment(Path(folder))

        def told(what: str, number: int) -> dict[str, Any]:
            return ask((*COMMAND, what, device, str(number)), env)

        count = QUICK_AGAIN if quick else AGAIN
        yield _many(f"{count} launches, {WEIGHTS}", told("again", count))
        count = QUICK_DISTINCT if quick else DISTINCT
        yield _many(f"{count} compilations, {KERNELS}", told("distinct", count))
        # others than those that are kept now; what Triton makes once for a store is there
        restarts = 2 if quick else RESTARTS
        numbers = [10_000 + 2 * n for n in range(restarts)]
        yield restart_row([told("restart", number) for number in numbers])
        for layers in QUICK_LAYERS if quick else LAYERS:
            row = _layers(told, layers)
            yield row
            if row.notes["refused"]:
                break


def _many(case: str, told: dict[str, Any]) -> Row:
    row = many_row(case, told)
    used = told["gpu_bytes"]
    row.notes |= {
        "place": "cuda",
        "compilations": told["compilations"],
        "gpu_bytes_before": told["gpu_bytes_before"],
        "gpu_bytes_after": used[-1],
        "gpu_bytes_a_compilation": round((used[-1] - told["gpu_bytes_before"]) / len(used)),
        "gpu_bytes_slope": round(slope(used)),
        "gpu_bytes_by_number": used[:: max(1, len(used) // 50)],
    }
    return row


def _layers(told: Told, layers: int) -> Row:
    about = told("layers", layers)
    names = ("refused", "weight_bytes", "operations", "apart_from_pytorch")
    notes = {"place": "cuda"} | {name: about[name] for name in names}
    row = Row(f"{layers} layers of 768/2048 in a launch", about["seconds"], notes=notes)
    return row
