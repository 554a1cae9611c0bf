"""compile-budget: whether a process can only compile so many times.

A trainer of the published study began a fresh process after 72 compilations, as more were thought
to fail; the study made 312 in one, then 150 distinct ones, without a failure. The same here with ML
Programs: compiled again and again for new weights, then of 150 shapes; seconds and memory by
number; what a fresh process costs; and how many layers one program may have until it is refused. On
a GPU with Triton's kernels: 150 distinct ones, and new weights, for which nothing is compiled, as
they are a kernel's arguments; the GPU's memory too; and how many layers one launch may have.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.children import run_child
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.studies.ane_mega_kernel.compile_budget import views
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.views import draw, findings, table
from onelaunch.engines.coreml import coremltools

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "s"
QUICK_AGAIN, QUICK_DISTINCT = 20, 10
RESTARTS, QUICK_RESTARTS = 5, 2
LAYERS, GPU_LAYERS, QUICK_LAYERS = (12, 24, 48, 96, 192), (12, 96), (12,)
FIRST_RESTART = 10_000
"""The number of a restart's first kernel: none of `distinct`, whose kernels are in the store."""
CHILD = "onelaunch.bench.studies.ane_mega_kernel.compile_budget.child"
GPU_CHILD = "onelaunch.bench.studies.ane_mega_kernel.compile_budget.cuda_child"


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    gpu = torch.device(device).type == "cuda"
    if not gpu:
        coremltools("bench compile-budget")
    with tempfile.TemporaryDirectory(prefix="onelaunch-kernels-") as folder:
        env = triton_store.environment(Path(folder)) if gpu else None

        def child(what: str, number: int) -> dict[str, Any]:
            module = GPU_CHILD if gpu else CHILD
            return dict(run_child((sys.executable, "-m", module, what, str(number), device), env))

        count = QUICK_AGAIN if quick else views.AGAIN
        what = "launches" if gpu else "compilations"
        yield _many(f"{count} {what}, {views.WEIGHTS}", child("again", count))
        count = QUICK_DISTINCT if quick else views.DISTINCT
        kind = views.KERNELS if gpu else views.SHAPES
        yield _many(f"{count} compilations, {kind}", child("distinct", count))
        restarts = range(QUICK_RESTARTS if quick else RESTARTS)
        fresh = [child("restart", FIRST_RESTART + 2 * number) for number in restarts]
        yield Row.of(views.FRESH, [each["until_first"] - each["second"] for each in fresh])
        for layers in QUICK_LAYERS if quick else GPU_LAYERS if gpu else LAYERS:
            result = child("layers", layers)
            names = ("refused", "weight_bytes", "operations", "apart_from_pytorch")
            notes = {"place": "cuda"} if gpu else {}
            notes |= {name: result[name] for name in names if name in result}
            case = f"{layers} layers of 768/2048 in a {'launch' if gpu else 'program'}"
            yield Row(case, result["seconds"], notes=notes)
            if result["refused"]:
                break


def _many(case: str, result: dict[str, Any]) -> Row:
    """A row of many compilations: all, the first tenth of them, the last, and memory by number."""
    seconds, memory = result["seconds"], result["bytes"]
    tenth, every = max(1, len(seconds) // 10), max(1, len(seconds) // 50)
    notes = {
        "failures": result["failures"],
        "first_tenth": round(statistics.median(seconds[:tenth]), 4),
        "last_tenth": round(statistics.median(seconds[-tenth:]), 4),
        "bytes_before": result["bytes_before"],
        "bytes_after": memory[-1],
        "bytes_a_compilation": round(_slope(memory[len(memory) // 2 :])),
        "bytes_by_number": memory[::every],
    }
    if "gpu_bytes" in result:
        used, before = result["gpu_bytes"], result["gpu_bytes_before"]
        notes |= {
            "place": "cuda",
            "compilations": result["compilations"],
            "gpu_bytes_before": before,
            "gpu_bytes_after": used[-1],
            "gpu_bytes_a_compilation": round((used[-1] - before) / len(used)),
            "gpu_bytes_slope": round(_slope(used)),
            "gpu_bytes_by_number": used[::every],
        }
    return Row.of(case, seconds, notes=notes)


def _slope(values: list[int]) -> float:
    """The slope of the least-squares line."""
    if len(values) < 2:
        return 0.0
    return statistics.linear_regression(range(len(values)), values).slope
