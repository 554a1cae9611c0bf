"""What a record of compile-budget says, of ML Programs or of a GPU's kernels: the table, the
picture, and the study's statements."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, Verdict, needs_a_mac
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.rows import (
    AGAIN,
    DISTINCT,
    KERNELS,
    SHAPES,
    WEIGHTS,
)

SHORT_RESTART = 0.5
"""Seconds: a restart below this costs none."""
FOUR_UPDATES = 252
"""Compilations of the study's run with 50 micro-steps an update."""
ABOUT_PROGRAMS = "ML Programs of one layer of stories260k, forward, emitted, converted and saved."
LAST_OF_PROGRAMS = (
    "Memory is what the system counts for the process; its growth is over the second half of "
    "the compilations. The study: 312 and 150 without a failure, about 1.7 s a restart."
)
LAYERS_OF_PROGRAMS = (
    "What is refused is so by this package's own check of a saved program; coremltools wrote it."
)


ABOUT_KERNELS = (
    "Distinct kernels: one that writes a number, another for each, compiled by Triton into an "
    "empty store, loaded, launched and waited for. New weights: a CUDA engine of one layer of "
    "stories260k made with them and launched, whose kernels were compiled before."
)
LAST_OF_KERNELS = (
    "Memory is what the system counts for the process; its growth is over the second half. The "
    "GPU's is all that is in use on it, which it gives out in large pieces. The study: 312 and 150 "
    "without a failure, about 1.7 s a restart."
)
LAYERS_OF_KERNELS = (
    "The kernel is one for any number of layers but for that number, a constant of it; this "
    "package counts up to 4,095 stages in a launch, 5 a layer. Seconds are of compiling and the "
    "first launch."
)


def on_gpu(record: dict[str, Any]) -> bool:
    """Whether a record was made on a GPU."""
    return any(row.get("place") == "cuda" for row in record["rows"])


def findings(record: dict[str, Any]) -> list[Finding]:
    """Failures, a restart's price, and how large a program or launch may be."""
    rows, gpu = {row["case"]: row for row in record["rows"]}, on_gpu(record)
    found = []
    if row := _most(rows, WEIGHTS):
        for key, count in (("budget-312", AGAIN), ("budget-252", FOUR_UPDATES)):
            found.append(_new_weights(key, count, row, gpu))
    if row := _most(rows, KERNELS if gpu else SHAPES):
        of_gpu = ""
        what = "coremltools' conversions"
        if gpu:
            what = "kernels of Triton's, loaded and launched"
            of_gpu = f", {row['gpu_bytes_a_compilation'] / 1e3:+.1f} kB on the GPU"
        found.append(_none_fail("budget-150", DISTINCT, row, what, of_gpu))
    if row := rows.get("a fresh process"):
        what = "coremltools and compiles once"
        if gpu:
            what = "PyTorch and Triton, opens the GPU and compiles a kernel"
        published = float(PUBLISHED["budget-restart"].values["s"])
        found.append(
            Finding(
                ("budget-restart",),
                "a restart costs seconds, so a budget is to be avoided",
                f"about {published:g} s",
                f"{row['ours']:.2f} s",
                "confirmed" if row["ours"] > SHORT_RESTART else "refuted",
                f"a process that imports {what}, less a compilation",
                row["ours"] / published,
            )
        )
    return found + _largest([row for row in rows.values() if "refused" in row], gpu)


def _most(rows: dict[str, dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Of a kind; a quick run's may stand beside a whole one's."""
    of_kind = (row for case, row in rows.items() if case.endswith(kind))
    return max(of_kind, key=lambda row: row["n"], default=None)


def _new_weights(key: str, count: int, row: dict[str, Any], gpu: bool) -> Finding:
    if not gpu:
        return _none_fail(key, count, row, "coremltools' conversions, the same in one process")
    return Finding(
        (key,),
        _claim(count),
        f"{count}, none failed",
        f"{row['n']} new weights: {row['compilations']} compiled, {_failed(row)}",
        "not applicable",
        "weights are a kernel's arguments: after an update there is nothing to be compiled",
    )


def _none_fail(key: str, published: int, row: dict[str, Any], what: str, more: str = "") -> Finding:
    slower = row["last_tenth"] / row["first_tenth"]
    verdict: Verdict = "refuted" if row["failures"] else "confirmed"
    if row["n"] < published:
        verdict = "quick run"
    return Finding(
        (key,),
        _claim(published),
        f"{published}, none failed",
        f"{row['n']}, {_failed(row)}",
        verdict,
        f"{what}; the last tenth took {slower:.2f} times the first's time; "
        f"{row['bytes_a_compilation'] / 1e3:+.1f} kB each{more}",
    )


def _claim(count: int) -> str:
    in_updates = " in four updates" if count == FOUR_UPDATES else ""
    return f"{count} compilations{in_updates} in one process do not fail"


def _failed(row: dict[str, Any]) -> str:
    return f"{row['failures'] or 'none'} failed"


def _largest(layers: list[dict[str, Any]], gpu: bool) -> list[Finding]:
    made = [row for row in layers if not row["refused"]]
    if not made:
        return []
    most = max(made, key=lambda row: row["weight_bytes"])
    megabytes, published = most["weight_bytes"] / 1e6, float(PUBLISHED["sram"].values["MB"])
    refused = next((row["refused"] for row in layers if row["refused"]), "none was refused")
    verdict, why = needs_a_mac(f"made and saved here, not run on a Neural Engine; {refused}")
    if gpu:
        verdict = "confirmed" if megabytes >= published else "not applicable"
        apart = f"{most['apart_from_pytorch']:.1%}"
        why = f"{most['case']}, logits {apart} from PyTorch's; {refused}"
    claim = f"{published:g} MB of weights in one program meet no limit"
    return [Finding(("sram",), claim, f"{published:g} MB", f"{megabytes:,.0f} MB", verdict, why)]


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    of_kernels = on_gpu(record)
    rows = record["rows"]
    many = [row for row in rows if "failures" in row]
    layers = [row for row in rows if "refused" in row]
    parts = [
        ABOUT_KERNELS if of_kernels else ABOUT_PROGRAMS,
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
        *(_memory_table(many) if of_kernels else ()),
        LAST_OF_KERNELS if of_kernels else LAST_OF_PROGRAMS,
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
            LAYERS_OF_KERNELS if of_kernels else LAYERS_OF_PROGRAMS,
        ]  # fmt: skip
    return document(record, "Compilations in one process, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Memory by number, the GPU's too."""
    many = [row for row in record["rows"] if "bytes_by_number" in row]
    if not many:
        return None
    figure, (axes,) = plots.panels(1, 7)
    for row in many:
        step = max(1, row["n"] // 50)
        for key, where in (("bytes_by_number", ""), ("gpu_bytes_by_number", ", the GPU's")):
            memory = [n / 1e6 for n in row.get(key, ())]
            if memory:
                axes.plot([i * step for i in range(len(memory))], memory, label=row["case"] + where)
    axes.set_ylim(bottom=0)
    title = f"Compilations in one process, {record['device']}"
    plots.label(axes, "compilations", "memory of the process, MB", title)
    return figure


def _memory_table(rows: list[dict[str, Any]]) -> list[str]:
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
