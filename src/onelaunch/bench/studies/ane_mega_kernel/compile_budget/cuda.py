"""compile-budget on a GPU: Triton's kernels compiled, loaded and launched in one process, and new
weights, for which nothing is to be compiled: they are a kernel's arguments. Seconds and memory by
number, the GPU's too; what a fresh process costs; and how many layers one launch may have."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.record import Row
from onelaunch.bench.core.tables import markdown
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.rows import (
    AGAIN,
    DISTINCT,
    QUICK_AGAIN,
    QUICK_DISTINCT,
    RESTARTS,
    child,
    many_row,
    restart_row,
    slope,
)
from onelaunch.engines.cuda import why_not
from onelaunch.errors import BadInput

CHILD = "onelaunch.bench.studies.ane_mega_kernel.compile_budget.cuda_child"
COMMAND = (sys.executable, "-m", CHILD)
LAYERS, QUICK_LAYERS = (12, 96), (12,)
WEIGHTS, KERNELS = "new weights", "distinct kernels"
SRAM_BYTES = 162e6
"""The study's."""
ABOUT = (
    "Distinct kernels: one that writes a number, another for each, compiled by Triton into an "
    "empty store, loaded, launched and waited for. New weights: a CUDA engine of one layer of "
    "stories260k made with them and launched, whose kernels were compiled before."
)
LAST = (
    "Memory is what the system counts for the process; its growth is over the second half. The "
    "GPU's is all that is in use on it, which it gives out in large pieces. The study: 312 and 150 "
    "without a failure, about 1.7 s a restart."
)
LAYERS_END = (
    "The kernel is one for any number of layers but for that number, a constant of it; this "
    "package counts up to 4,095 stages in a launch, 5 a layer. Seconds are of compiling and the "
    "first launch."
)


Told = Callable[[str, int], dict[str, Any]]


def run(device: str, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Every case; yields rows. Raises BadInput where the CUDA engine cannot run."""
    if reason := why_not(torch.device(device)):
        raise BadInput(f"compile-budget: --device {device}: {reason}")
    with tempfile.TemporaryDirectory(prefix="onelaunch-kernels-") as folder:
        env = triton_store.environment(Path(folder))

        def told(what: str, number: int) -> dict[str, Any]:
            return child((*COMMAND, what, device, str(number)), env)

        count = QUICK_AGAIN if quick else AGAIN
        yield _many(f"{count} launches, {WEIGHTS}", told("again", count), say)
        count = QUICK_DISTINCT if quick else DISTINCT
        yield _many(f"{count} compilations, {KERNELS}", told("distinct", count), say)
        # others than those that are kept now; what Triton makes once for a store is there
        restarts = 2 if quick else RESTARTS
        numbers = [10_000 + 2 * n for n in range(restarts)]
        yield restart_row([told("restart", number) for number in numbers], say)
        for layers in QUICK_LAYERS if quick else LAYERS:
            row = _layers(told, layers, say)
            yield row
            if row.notes["refused"]:
                break


def _many(case: str, told: dict[str, Any], say: Callable[[str], None]) -> Row:
    row = many_row(case, told, say)
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
    say(
        f"{case}: {told['compilations']} compiled; "
        f"{row.notes['gpu_bytes_a_compilation'] / 1e3:+,.1f} kB of the GPU's memory each"
    )
    return row


def _layers(told: Told, layers: int, say: Callable[[str], None]) -> Row:
    about = told("layers", layers)
    names = ("refused", "weight_bytes", "operations", "apart_from_pytorch")
    notes = {"place": "cuda"} | {name: about[name] for name in names}
    row = Row(f"{layers} layers of 768/2048 in a launch", about["seconds"], notes=notes)
    answer = f"refused: {about['refused']}" if about["refused"] else "right"
    say(f"{row.case}: {row.ours:.1f} s, {about['weight_bytes'] / 1e6:,.0f} MB; {answer}")
    return row


def is_of_kernels(record: dict[str, Any]) -> bool:
    """Whether a record was made on a GPU."""
    return any(row.get("place") == "cuda" for row in record["rows"])


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """The GPU's memory, and what was compiled."""
    lines = [
        [
            row["case"], str(row["compilations"]), f"{row['gpu_bytes_before'] / 1e6:,.0f}",
            f"{row['gpu_bytes_after'] / 1e6:,.0f}", f"{row['gpu_bytes_a_compilation'] / 1e3:+,.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["", "compiled", "MB of the GPU's before", "MB after", "kB each"]
    return [markdown(header, lines)]


def findings(record: dict[str, Any]) -> list[Finding]:
    """Failures, a restart's price, and how much a launch may hold."""
    rows = {row["case"]: row for row in record["rows"]}
    found = []
    by_end = {  # a quick run's may stand beside a whole one's
        end: max(
            (r for c, r in rows.items() if c.endswith(end)), key=lambda r: r["n"], default=None
        )
        for end in (WEIGHTS, KERNELS)
    }
    if row := by_end[WEIGHTS]:
        found.append(
            Finding(
                ("budget-312", "budget-252"),
                "312 compilations in one process do not fail",
                "312, none failed",
                f"{row['n']} new weights: {row['compilations']} compiled, "
                f"{row['failures'] or 'none'} failed",
                "not applicable",
                "weights are a kernel's arguments: after an update there is nothing to be compiled",
            )
        )
    if row := by_end[KERNELS]:
        slower, fewer = row["last_tenth"] / row["first_tenth"], row["n"] < DISTINCT
        found.append(
            Finding(
                ("budget-150",),
                "150 compilations in one process do not fail",
                "150, none failed",
                f"{row['n']}, {row['failures'] or 'none'} failed",
                "refuted" if row["failures"] else "quick run" if fewer else "confirmed",
                f"kernels of Triton's, loaded and launched; the last tenth took {slower:.2f} "
                f"times the first's time; {row['bytes_a_compilation'] / 1e3:+.1f} kB each, "
                f"{row['gpu_bytes_a_compilation'] / 1e3:+.1f} kB on the GPU",
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
                "a process that imports PyTorch and Triton, opens the GPU and compiles a kernel, "
                "less a compilation",
                row["ours"] / 1.7,
            )
        )
    layers = [row for row in rows.values() if "refused" in row]
    if made := [row for row in layers if not row["refused"]]:
        most = max(made, key=lambda row: row["weight_bytes"])
        enough = most["weight_bytes"] >= SRAM_BYTES
        refused = next((row["refused"] for row in layers if row["refused"]), "none was refused")
        found.append(
            Finding(
                ("sram",),
                "162 MB of weights in one program meet no limit",
                "162 MB",
                f"{most['weight_bytes'] / 1e6:,.0f} MB",
                "confirmed" if enough else "not applicable",
                f"{most['case']}, logits {most['apart_from_pytorch']:.1%} from PyTorch's; "
                f"{refused}",
            )
        )
    return found
