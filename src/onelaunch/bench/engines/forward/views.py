"""Tables and plot of a record of forward."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import Cell, by_columns, digits, document, figure

MORE_FIRSTS = ("its kernel alone", "torch.compile", "kept", "Triton reads itself")
ANEW = 0.1
"""Of the first form's seconds: what takes less compiles nothing."""
PEERS = ("torch.compile + graph", "torch.compile", "eager + graph", "eager")


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings about the time of each fused form until its first forward: one kernel serves them
    all, and a form after the first compiles nothing."""
    findings = []
    for row in record["rows"]:
        seconds = row["seconds_to_first"]
        fused = {form: s for form, s in seconds.items() if form.startswith("fused ")}
        if len(fused) < 2:
            continue
        first, *others = fused.values()
        each = ", ".join(f"{form} {s:.2f}" for form, s in fused.items())
        findings.append(
            Finding(
                ("compile-forms",),
                f"{row['case']}: each fused form is compiled anew",
                str(PUBLISHED["compile-forms"].values["told"]),
                f"{each} s to a first forward, in this order",
                "refuted" if max(others) < ANEW * first else "confirmed",
                "one kernel holds all stages, whichever a launch runs; one kernel per stage takes "
                f"{seconds['staged']:.2f} s, torch.compile {seconds['torch.compile']:.2f}",
            )
        )
    return findings


def table(record: dict[str, Any]) -> str:
    """The record's tables in Markdown: every case with its forms and peers."""
    rows = record["rows"]
    forms = list(dict.fromkeys(form for row in rows for form in row["forms"]))
    # rows of before `logits` was measured have the graph's time alone
    ours: dict[str, Cell] = {
        "us": figure("case", form=str),
        "logits": lambda row: f"**{digits(row['ours'])}**" if "graph" in row else "-",
        "float32": figure("logits float32", "median"),
        **{form: figure("forms", form, "median") for form in forms},
        **{peer: figure("peers", peer) for peer in PEERS},
        "over best peer": lambda row: f"{min(row['speedup'].values()):.2f}x",
        "over eager": lambda row: f"{row['speedup']['eager']:.1f}x",
        "over its graph": lambda row: f"{row['over_graph']:.3f}" if "graph" in row else "-",
        "floor": figure("floor"),
    }
    more = [name for name in MORE_FIRSTS if any(name in row["seconds_to_first"] for row in rows)]
    seconds: dict[str, Cell] = {"s": figure("case", form=str)}
    seconds |= {name: figure("seconds_to_first", name, form=".2f") for name in (*forms, *more)}
    parts = [
        "Medians in us of a forward in bfloat16, logits of every position. `logits`: wall time of "
        "`engine.logits`, which `over` is of, and with float32 logits. The forms are "
        "CUDA graphs alone, of `chosen` what the engine measured and runs; `fused`: how much one "
        "launch holds (all, half a layer, so many layers), `staged`: one kernel per stage, both "
        "with the rule's tiles. Peers as CUDA graphs, and as they are: these two are timed alone, "
        "in the host's quiet moments.",
        by_columns(rows, ours),
        "## Seconds from the weights on the device to a first forward",
        "After imports, and nothing compiled before, though all forms in few launches are one "
        "kernel, the first one's; `its kernel alone`: what of that is compiling it. `chosen` with "
        "all that is measured; `kept` in a new process that finds the choice and its kernels, from "
        "weights as checkpoints name them, after the time in which Triton reads all of itself, "
        "once a process, to know what it has compiled.",
        by_columns(rows, seconds),
    ]
    if chosen := [row for row in rows if "choice" in row]:
        text = by_columns(chosen, _choice_columns(chosen))
        parts += ["## What was chosen", "us by form in the measurement itself.", text]
    return document(record, "A forward of whole sequences on", *parts)


def _choice_columns(rows: list[dict[str, Any]]) -> dict[str, Cell]:
    def tile(kind: str) -> Cell:
        # a blocking's fields in their order, without those that it does not use
        return lambda row: " ".join(
            str(value) for value in row["choice"]["tiles"][kind] if value is not False
        )

    return {
        "case": figure("case", form=str),
        "form": figure("choice", "form", form=str),
        "us": lambda row: ", ".join(
            f"{form} {digits(us)}" for form, us in row["choice"]["us"].items()
        ),
        "timed": figure("choice", "tried", form=str),
        **{kind: tile(kind) for kind in rows[0]["choice"]["tiles"]},
    }


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Bars: the forms and the fastest peer of each case, over the fastest of ours."""
    series: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        times = {form: each["median"] for form, each in row["forms"].items()}
        times[PEERS[0]] = row["peers"][PEERS[0]]
        for name, us in times.items():
            series.setdefault(name, {})[row["case"]] = us / row["ours"]
    return plots.bars(
        "Forward of whole sequences, over our fastest form",
        series,
        "",
        "time over that of our fastest form",
        names={row["case"]: row["case"].replace(" forward ", "\n") for row in record["rows"]},
        at=1,
    )
