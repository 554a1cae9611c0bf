"""What a record of compile-budget says, of ML Programs or of a GPU's kernels: the table, the
picture, and the study's statements."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, Verdict, needs_a_mac
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import CASE, column, published, table_of

AGAIN, DISTINCT = 312, 150
FOUR_UPDATES = 252
"""Compilations of the study's run with 50 micro-steps an update."""
WEIGHTS, SHAPES, KERNELS = "new weights", "distinct shapes", "distinct kernels"
"""What is compiled, as the cases' names end."""
FRESH = "a fresh process"
SHORT_RESTART = 0.5
"""Seconds: a restart below this costs none."""

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


def _on_gpu(record: dict[str, Any]) -> bool:
    return any(row.get("place") == "cuda" for row in record["rows"])


def findings(record: dict[str, Any]) -> list[Finding]:
    """Failures, a restart's price, and how large a program or launch may be."""
    rows, gpu = {row["case"]: row for row in record["rows"]}, _on_gpu(record)
    results = []
    if row := _most(rows, WEIGHTS):
        for key, count in (("budget-312", AGAIN), ("budget-252", FOUR_UPDATES)):
            what = "coremltools' conversions, the same in one process"
            results.append(_new_weights(key, count, row) if gpu else _fail(key, count, row, what))
    if row := _most(rows, KERNELS if gpu else SHAPES):
        what, more = "coremltools' conversions", ""
        if gpu:
            what = "kernels of Triton's, loaded and launched"
            more = f", {row['gpu_bytes_a_compilation'] / 1e3:+.1f} kB on the GPU"
        results.append(_fail("budget-150", DISTINCT, row, what, more))
    if row := rows.get(FRESH):
        theirs = published("budget-restart", "s")
        what = "PyTorch and Triton, opens the GPU and compiles a kernel"
        results.append(
            Finding(
                ("budget-restart",),
                "a restart costs seconds, so a budget is to be avoided",
                f"about {theirs:g} s",
                f"{row['ours']:.2f} s",
                "confirmed" if row["ours"] > SHORT_RESTART else "refuted",
                f"a process that imports {what if gpu else 'coremltools and compiles once'}, less "
                "a compilation",
                row["ours"] / theirs,
            )
        )
    return results + _largest([row for row in rows.values() if "refused" in row], gpu)


def _most(rows: dict[str, dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Of a kind; a record may have a quick run's as well as a whole one's."""
    of_kind = (row for case, row in rows.items() if case.endswith(kind))
    return max(of_kind, key=lambda row: row["n"], default=None)


def _new_weights(key: str, count: int, row: dict[str, Any]) -> Finding:
    ours = f"{row['n']} new weights: {row['compilations']} compiled, {_failed(row)}"
    why = "weights are a kernel's arguments: after an update there is nothing to be compiled"
    return Finding((key,), _claim(count), f"{count}, none failed", ours, "not applicable", why)


def _fail(key: str, count: int, row: dict[str, Any], what: str, more: str = "") -> Finding:
    slower = row["last_tenth"] / row["first_tenth"]
    verdict: Verdict = "refuted" if row["failures"] else "confirmed"
    if row["n"] < count:
        verdict = "quick run"
    why = f"{what}; the last tenth took {slower:.2f} times the first's time; "
    why += f"{row['bytes_a_compilation'] / 1e3:+.1f} kB each{more}"
    ours = f"{row['n']}, {_failed(row)}"
    return Finding((key,), _claim(count), f"{count}, none failed", ours, verdict, why)


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
    megabytes, theirs = most["weight_bytes"] / 1e6, published("sram", "MB")
    refused = next((row["refused"] for row in layers if row["refused"]), "none was refused")
    verdict, why = needs_a_mac(f"made and saved here, not run on a Neural Engine; {refused}")
    if gpu:
        verdict = "confirmed" if megabytes >= theirs else "not applicable"
        apart = f"{most['apart_from_pytorch']:.1%}"
        why = f"{most['case']}, logits {apart} from PyTorch's; {refused}"
    claim = f"{theirs:g} MB of weights in one program meet no limit"
    return [Finding(("sram",), claim, f"{theirs:g} MB", f"{megabytes:,.0f} MB", verdict, why)]


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    rows, gpu = record["rows"], _on_gpu(record)
    many = [row for row in rows if "failures" in row]
    layers = [row for row in rows if "refused" in row]
    of_kernels = table_of(
        many,
        CASE,
        column("compiled", "compilations"),
        column("MB of the GPU's before", "gpu_bytes_before", "{:,.0f}", 1e-6),
        column("MB after", "gpu_bytes_after", "{:,.0f}", 1e-6),
        column("kB each", "gpu_bytes_a_compilation", "{:+,.1f}", 1e-3),
    )
    parts = [
        ABOUT_KERNELS if gpu else ABOUT_PROGRAMS,
        table_of(
            many,
            CASE,
            column("failed", "failures"),
            column("s (median)", "ours", "{:.3f}"),
            column("first tenth", "first_tenth", "{:.3f}"),
            column("last tenth", "last_tenth", "{:.3f}"),
            column("MB before", "bytes_before", "{:,.0f}", 1e-6),
            column("MB after", "bytes_after", "{:,.0f}", 1e-6),
            column("kB a compilation", "bytes_a_compilation", "{:+,.1f}", 1e-3),
        ),
        *([of_kernels] if gpu else []),
        LAST_OF_KERNELS if gpu else LAST_OF_PROGRAMS,
    ]
    parts += [
        f"A fresh process takes {digits(row['ours'])} s more than a compilation in an old one."
        for row in rows
        if row["case"] == FRESH
    ]
    if layers:
        parts += [
            f"## How many layers a {'launch' if gpu else 'program'} may have",
            table_of(
                layers,
                CASE,
                column("s", "ours", digits),
                column("MB of weights", "weight_bytes", "{:,.0f}", 1e-6),
                column("stages" if gpu else "operations", "operations", "{:,}"),
                ("", lambda row: row["refused"] or "made"),
            ),
            LAYERS_OF_KERNELS if gpu else LAYERS_OF_PROGRAMS,
        ]
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
            if memory := [n / 1e6 for n in row.get(key, ())]:
                axes.plot([i * step for i in range(len(memory))], memory, label=row["case"] + where)
    axes.set_ylim(bottom=0)
    title = f"Compilations in one process, {record['device']}"
    plots.label(axes, "compilations", "memory of the process, MB", title)
    return figure
