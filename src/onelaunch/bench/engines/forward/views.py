"""What the record of forward looks like as a table and as a picture."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown

MORE_FIRSTS = ("its kernel alone", "torch.compile", "kept", "Triton reads itself")
ANEW = 0.1
"""Of the first form's seconds: what takes less compiles nothing."""
PEERS = ("torch.compile + graph", "torch.compile", "eager + graph", "eager")


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of what each fused form takes until its first forward: one kernel serves them all, and a
    form after the first compiles nothing."""
    found = []
    for row in record["rows"]:
        seconds = row["seconds_to_first"]
        fused = {form: s for form, s in seconds.items() if form.startswith("fused ")}
        if len(fused) < 2:
            continue
        first, *others = fused.values()
        told = ", ".join(f"{form} {s:.2f}" for form, s in fused.items())
        found.append(
            Finding(
                ("compile-forms",),
                f"{row['case']}: each fused form is compiled anew",
                str(PUBLISHED["compile-forms"].values["told"]),
                f"{told} s to a first forward, in this order",
                "refuted" if max(others) < ANEW * first else "confirmed",
                "one kernel holds all stages, whichever a launch runs; one kernel per stage takes "
                f"{seconds['staged']:.2f} s, torch.compile {seconds['torch.compile']:.2f}",
            )
        )
    return found


def table(record: dict[str, Any]) -> str:
    """In Markdown: every case with its forms and peers."""
    rows = record["rows"]
    forms = list(dict.fromkeys(form for row in rows for form in row["forms"]))
    ours = ["logits", "float32"]
    head = ["us", *ours, *forms, *PEERS, "over best peer", "over eager", "over its graph", "floor"]
    body = []
    for row in rows:
        best = min(row["speedup"].values())
        # rows of before this was measured have the graph's time alone
        wide = digits(row["logits float32"]["median"]) if "graph" in row else "-"
        cells = [row["case"], f"**{digits(row['ours'])}**" if "graph" in row else "-", wide]
        for form in forms:
            each = row["forms"].get(form)
            cells.append(digits(each["median"]) if each else "-")
        cells += [digits(row["peers"][peer]) for peer in PEERS]
        cells += [f"{best:.2f}x", f"{row['speedup']['eager']:.1f}x"]
        cells += [f"{row['over_graph']:.3f}" if "graph" in row else "-", digits(row["floor"])]
        body.append(cells)
    more = [name for name in MORE_FIRSTS if any(name in row["seconds_to_first"] for row in rows)]
    firsts = [*forms, *more]
    seconds = [
        [row["case"], *(_seconds(row["seconds_to_first"].get(form)) for form in firsts)]
        for row in rows
    ]
    parts = [
        "Medians in us of a forward in bfloat16, logits of every position. `logits`: wall time of "
        "`engine.logits`, which is what `over` is said of, and with float32 logits. The forms are "
        "CUDA graphs alone, of `chosen` what the engine measured and runs; `fused`: how much one "
        "launch holds (all, half a layer, so many layers), `staged`: one kernel per stage, both "
        "with the rule's tiles. Peers as CUDA graphs, and as they are: these two are timed alone, "
        "in the host's quiet moments.",
        markdown(head, body),
        "## Seconds from the weights on the device to a first forward",
        "After imports, and nothing compiled before, though all forms in few launches are one "
        "kernel, the first one's; `its kernel alone`: what of that is compiling it. `chosen` with "
        "all that is measured; `kept` in a new process that finds the choice and its kernels, from "
        "weights as checkpoints name them, after the time in which Triton reads all of itself, "
        "once a process, to know what it has compiled.",
        markdown(["s", *firsts], seconds),
    ]
    if any("choice" in row for row in rows):
        parts += ["## What was chosen", "us by form in the measurement itself.", _choices(rows)]
    return document(record, "A forward of whole texts on", *parts)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _choices(rows: list[dict[str, Any]]) -> str:
    chosen = [row for row in rows if "choice" in row]
    kinds = list(chosen[0]["choice"]["tiles"])
    body = []
    for row in chosen:
        choice = row["choice"]
        us = ", ".join(f"{form} {digits(value)}" for form, value in choice["us"].items())
        # a blocking's fields in their order, what it has no use for left out
        tiles = [
            " ".join(str(v) for v in choice["tiles"][kind] if v is not False) for kind in kinds
        ]
        body.append([row["case"], choice["form"], us, str(choice["tried"]), *tiles])
    return markdown(["case", "form", "us", "timed", *kinds], body)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Bars: the forms and the fastest peer of each case, over the fastest of ours."""
    series: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        times = {form: each["median"] for form, each in row["forms"].items()}
        times[PEERS[0]] = row["peers"][PEERS[0]]
        for name, us in times.items():
            series.setdefault(name, {})[row["case"]] = us / row["ours"]
    return plots.bars(
        "Forward of whole texts, over our fastest form", series, "",
        "time over that of our fastest form", names=_shapes(record), at=1,
    )  # fmt: skip


def _shapes(record: dict[str, Any]) -> dict[str, str]:
    """Short names of the cases."""
    return {row["case"]: row["case"].replace(" forward ", "\n") for row in record["rows"]}
