"""What a record of accumulation says: the table, the picture, and the study's statements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import (
    Finding,
    Verdict,
    error_of_ratio,
    of_a_gain,
    without_evaluated_seconds,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown, spread

KEYS = ("accum-10", "accum-50", "accum-100", "accum-500")
MOSTLY = 0.5
"""Of the time: an update of 10 that compiles for longer than this mostly compiles."""
LEAST_UPDATES = 5
"""In a run, for its loss to say anything about a learning rate."""
LEAST_NATS = 0.02
"""A difference of losses below this, or below what seeds alone make, is none."""
Rows = list[dict[str, Any]]


def series(record: dict[str, Any]) -> dict[str, Rows]:
    """The rows of rates, by what trained, shortest updates first."""
    found: dict[str, Rows] = {}
    for row in record["rows"]:
        if "micro_steps_per_s" in row:
            found.setdefault(row["case"].rsplit(", ", 1)[0], []).append(row)
    return {name: sorted(rows, key=lambda row: row["accum"]) for name, rows in found.items()}


def findings(record: dict[str, Any]) -> list[Finding]:
    """By what trained, each published number of micro-steps; then what they cost in learning."""
    found = []
    for name, rows in series(record).items():
        by_accum = {row["accum"]: row for row in rows}
        for key in KEYS:
            row, base = by_accum.get(int(PUBLISHED[key].row)), by_accum.get(10)
            if row is None or base is None:
                continue
            if key == "accum-10":
                found.append(_baseline(name, row))
            else:
                found.append(_speedup(key, name, row, base))
    return [*without_evaluated_seconds(found), *_learning(record)]


def _baseline(name: str, row: dict[str, Any]) -> Finding:
    theirs = PUBLISHED["accum-10"].values
    share, published = row["compile_share"], float(theirs["compiling, %"]) / 100
    verdict: Verdict = "confirmed" if share > MOSTLY else "refuted"
    if not row["compile_seconds"]:
        verdict = "not applicable"
    return Finding(
        ("accum-10",),
        f"{name}: with 10 micro-steps an update most of the time is compiling",
        f"{published:.1%} compiling; {theirs['ms/micro-step']} ms a micro-step, "
        f"{theirs['micro-steps/s']} a second",
        f"{share:.1%} compiling; {row['ours']:.1f} ms a micro-step, "
        f"{row['micro_steps_per_s']:.2f} a second",
        verdict,
        _compilation(row),
        share / published,
    )


def _speedup(key: str, name: str, row: dict[str, Any], base: dict[str, Any]) -> Finding:
    theirs = PUBLISHED[key].values
    published = float(theirs["speedup"])
    ratio = row["speedup"] / published
    verdict, why = of_a_gain(row["speedup"], published, error_of_ratio(row["speedup"], row, base))
    if row["computed"]:
        verdict = "arithmetic"
    return Finding(
        (key,),
        f"{name}: {row['accum']} micro-steps an update are {published:g} times as fast as 10",
        f"{published:g} times, {theirs['compiling, %']:g}% compiling",
        f"{row['speedup']:.2f} times, {row['compile_share']:.1%} compiling"
        + ("; computed, not timed" if row["computed"] else ""),
        verdict,
        f"{why}; {_compilation(base)}",
        ratio,
    )


def _compilation(row: dict[str, Any]) -> str:
    """How many micro-steps a compilation lasts, which all speedups follow from."""
    if not row["compile_seconds"]:
        return "the weights are arguments here: an update has nothing to compile"
    steps = 1e3 * row["compile_seconds"] / row["ours"]
    return f"a compilation lasts as long as {steps:.0f} micro-steps here"


def _learning(record: dict[str, Any]) -> Iterator[Finding]:
    rows = [row for row in record["rows"] if "rule" in row]
    base = next((row for row in rows if row["rule"] == "any"), None)
    if base is None:
        return
    noise = max(LEAST_NATS, base["range"])
    above = sorted({row["accum"] for row in rows if row["accum"] > base["accum"]})
    for accum in above:
        by_rule = {row["rule"]: row["ours"] for row in rows if row["accum"] == accum}
        if not {"none", "linear"} <= by_rule.keys():
            continue
        updates = min(row["updates"] for row in rows if row["accum"] == accum)
        verdict: Verdict = "quick run"
        gain = by_rule["none"] - by_rule["linear"]
        if updates >= LEAST_UPDATES:
            verdict = "confirmed" if gain > noise else "refuted"
        best = min(by_rule, key=lambda rule: by_rule[rule])
        told = ", ".join(f"{rule} {loss:.3f}" for rule, loss in by_rule.items())
        yield Finding(
            ("accum-learning",),
            f"with {accum} micro-steps an update the learning rate is to grow in proportion",
            "advised, not measured",
            f"loss by rule: {told}; {base['accum']} micro-steps: {base['ours']:.3f} nats",
            verdict,
            f"{updates} updates; the linear rule {'wins' if gain > 0 else 'loses'} "
            f"{abs(gain):.3f} nats; best is {best}, "
            f"{by_rule[best] - base['ours']:+.3f} nats from {base['accum']} micro-steps "
            f"after as many tokens; seeds alone make {base['range']:.3f}",
        )


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    parts = []
    rates = [row for rows in series(record).values() for row in rows]
    if rates:
        parts += [
            "## What more of them save",
            markdown(
                [
                    "one text at a time", "ms/micro-step", "p20-p80", "updates timed",
                    "micro-steps/s", "updates/s", "tokens/s", "compiling", "optimizer",
                    "over 10", "study: ms", "/s", "compiling", "over 10",
                ],
                [_line(row) for row in rates],
            ),
            "Milliseconds are without the wait for a compilation, rates with it. The study: "
            "stories110M on an M1 Pro; its milliseconds stand beside ours and are not compared. "
            "Through ML Programs every update waits for its compilation, and they are evaluated "
            "on this CPU; 0 updates timed: computed as K / (K step + compile). The study's row of "
            "500 is so, too.",
        ]  # fmt: skip
    made = [row for row in record["rows"] if "when" in row]
    if made:
        parts += [
            "## What is made of the weights on the GPU",
            markdown(
                ["", "ms", "p20-p80", "when"],
                [[row["case"], digits(row["ours"]), spread(row), row["when"]] for row in made],
            ),
        ]
    learnt = [row for row in record["rows"] if "rule" in row]
    if learnt:
        parts += [
            "## What they cost in learning",
            markdown(
                ["", "rate at its highest", "updates", "tokens", "validation loss, nats", "seeds",
                 "least to most"],
                [
                    [
                        row["case"].removeprefix("learning "), f"{row['rate']:.2g}",
                        str(row["updates"]), f"{row['tokens']:,}", f"{row['ours']:.4f}",
                        str(row["n"]), f"{row['range']:.4f}" if row["n"] > 1 else "-",
                    ]
                    for row in learnt
                ],
            ),
            "Equally many tokens for every row. Rules scale the rate of 10 micro-steps an update; "
            "no row's rate was searched for. The study trained on synthetic data and measured no "
            "loss.",
        ]  # fmt: skip
    return document(record, "Micro-steps an update, on", *parts)


def _line(row: dict[str, Any]) -> list[str]:
    published = PUBLISHED.get(f"accum-{row['accum']}")
    theirs = ["-"] * 4
    if published is not None:
        values = published.values
        theirs = [
            f"{values['ms/micro-step']}", f"{values['micro-steps/s']}",
            f"{values['compiling, %']}%", f"{values['speedup']}",
        ]  # fmt: skip
    share = row["optimizer_share"]
    return [
        row["case"], digits(row["ours"]), spread(row), str(row["updates_timed"]),
        digits(row["micro_steps_per_s"]), f"{row['updates_per_s']:.3f}",
        digits(row["tokens_per_s"]), f"{row['compile_share']:.1%}",
        "-" if share is None else f"{share:.2%}", f"{row['speedup']:.2f}", *theirs,
    ]  # fmt: skip


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Rates over 10 micro-steps', and the losses."""
    rates = series(record)
    if not rates:
        return None
    title = f"Micro-steps an update, {record['device']}"
    figure, (left, right) = plots.panels(2, 5.5, 4.2, title)
    for name, rows in rates.items():
        left.plot([r["accum"] for r in rows], [r["speedup"] for r in rows], "o-", label=name)
    theirs = [PUBLISHED[key] for key in KEYS]
    xs, ys = [int(p.row) for p in theirs], [float(p.values["speedup"]) for p in theirs]
    left.plot(xs, ys, "k--", marker="x", label="study, M1 Pro's Neural Engine")
    learnt = sorted((r for r in record["rows"] if "rule" in r), key=lambda row: row["accum"])
    for rule in dict.fromkeys(row["rule"] for row in learnt if row["rule"] != "any"):
        shown = [row for row in learnt if row["rule"] in (rule, "any")]
        right.plot([r["accum"] for r in shown], [r["ours"] for r in shown], "o-", label=rule)
    what = "micro-steps an update"
    plots.label(left, what, "micro-steps/s, over those of 10 an update", log="xy")
    plots.label(right, what, "validation loss after as many tokens, nats", log="x")
    return figure
