"""Table, plot and findings of a record of accumulation."""

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
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import (
    CASE,
    Column,
    column,
    median_and_spread,
    over_pytorch,
    published,
    table_of,
)

KEYS = ("accum-10", "accum-50", "accum-100", "accum-500")
MOSTLY = 0.5
"""Of the time: an update of 10 that compiles for longer than this mostly compiles."""
LITTLE = 0.01
"""Of the time: an update of an engine that takes less than this hardly counts."""
LEAST_UPDATES = 5
"""In a run, for its loss to say anything about a learning rate."""
LEAST_NATS = 0.02
"""A difference of losses below this, or below what seeds alone make, is none."""
Row = dict[str, Any]
ENGINE_ROWS = (
    " The engine is the one that `onelaunch train` takes on this device; its updates and PyTorch's "
    "took turns."
)


def series(record: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of rates, by what trained, shortest updates first."""
    by_name: dict[str, list[Row]] = {}
    for row in record["rows"]:
        if "micro_steps_per_s" in row:
            by_name.setdefault(row["case"].rsplit(", ", 1)[0], []).append(row)
    return {name: sorted(rows, key=lambda row: row["accum"]) for name, rows in by_name.items()}


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings by trainer, for each published number of micro-steps; then what they cost in
    learning."""
    results = []
    for name, rows in series(record).items():
        by_accum = {row["accum"]: row for row in rows}
        if base := by_accum.get(10):
            results.append(_baseline(name, base))
            for key in KEYS[1:]:
                if row := by_accum.get(int(PUBLISHED[key].row)):
                    results.append(_speedup(key, name, row, base))
        if {1, 10, 100} <= by_accum.keys() and _is_engine(by_accum[100]):
            results.append(_saving(name, by_accum[1], by_accum[10], by_accum[100]))
    return [*without_evaluated_seconds(results), *_learning(record)]


def _baseline(name: str, row: Row) -> Finding:
    theirs = PUBLISHED["accum-10"].values
    share, their_share = row["compile_share"], float(theirs["compiling, %"]) / 100
    verdict: Verdict = "confirmed" if share > MOSTLY else "refuted"
    if not row["compile_seconds"]:
        verdict = "not applicable"
    return Finding(
        ("accum-10",),
        f"{name}: with 10 micro-steps an update most of the time is compiling",
        f"{their_share:.1%} compiling; {theirs['ms/micro-step']} ms a micro-step, "
        f"{theirs['micro-steps/s']} a second",
        f"{share:.1%} compiling; {row['ours']:.1f} ms a micro-step, "
        f"{row['micro_steps_per_s']:.2f} a second",
        verdict,
        _compilation(row),
        share / their_share,
    )


def _speedup(key: str, name: str, row: Row, base: Row) -> Finding:
    theirs, ours = published(key, "speedup"), row["speedup"]
    verdict, why = of_a_gain(ours, theirs, error_of_ratio(ours, row, base))
    return Finding(
        (key,),
        f"{name}: {row['accum']} micro-steps an update are {theirs:g} times as fast as 10",
        f"{theirs:g} times, {published(key, 'compiling, %'):g}% compiling",
        f"{ours:.2f} times, {row['compile_share']:.1%} compiling"
        + ("; computed, not timed" if row["computed"] else ""),
        "arithmetic" if row["computed"] else verdict,
        f"{why}; {_compilation(base)}",
        ours / theirs,
    )


def _is_engine(row: Row) -> bool:
    """Whether a row is of an engine of ours that trains, rather than of PyTorch or ML Programs."""
    return "over_pytorch" in row


def _saving(name: str, one: Row, ten: Row, hundred: Row) -> Finding:
    """What more micro-steps share where nothing is compiled: clipping and the optimizer step."""
    shares = [row["optimizer_share"] for row in (one, ten, hundred)]
    return Finding(
        (),
        f"{name}: with 100 micro-steps an update its optimizer step hardly counts",
        "not measured",
        f"{shares[0]:.1%} of the time with 1 micro-step, {shares[1]:.1%} with 10, "
        f"{shares[2]:.2%} with 100",
        "confirmed" if shares[2] < LITTLE else "refuted",
        f"less than {LITTLE:.0%} with 100 is confirmed; 100 are "
        f"{hundred['speedup'] / one['speedup']:.2f} times as fast as 1",
    )


def _compilation(row: Row) -> str:
    """The finding on the micro-steps that a compilation lasts, which all speedups follow from."""
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
    for accum in sorted({row["accum"] for row in rows if row["accum"] > base["accum"]}):
        by_rule = {row["rule"]: row["ours"] for row in rows if row["accum"] == accum}
        if not {"none", "linear"} <= by_rule.keys():
            continue
        updates = min(row["updates"] for row in rows if row["accum"] == accum)
        gain = by_rule["none"] - by_rule["linear"]
        verdict: Verdict = "confirmed" if gain > noise else "refuted"
        best = min(by_rule, key=lambda rule: by_rule[rule])
        losses = ", ".join(f"{rule} {loss:.3f}" for rule, loss in by_rule.items())
        yield Finding(
            ("accum-learning",),
            f"with {accum} micro-steps an update the learning rate is to grow in proportion",
            "advised, not measured",
            f"loss by rule: {losses}; {base['accum']} micro-steps: {base['ours']:.3f} nats",
            verdict if updates >= LEAST_UPDATES else "quick run",
            f"{updates} updates; the linear rule {'wins' if gain > 0 else 'loses'} "
            f"{abs(gain):.3f} nats; best is {best}, "
            f"{by_rule[best] - base['ours']:+.3f} nats from {base['accum']} micro-steps "
            f"after as many tokens; seeds alone make {base['range']:.3f}",
        )


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = []
    if rates := [row for rows in series(record).values() for row in rows]:
        parts += [
            "## What more of them save",
            table_of(
                rates,
                column("one sequence at a time", "case"),
                *median_and_spread("ms/micro-step"),
                column("updates timed", "updates_timed"),
                column("micro-steps/s", "micro_steps_per_s", digits),
                column("updates/s", "updates_per_s", "{:.3f}"),
                column("tokens/s", "tokens_per_s", digits),
                column("compiling", "compile_share", "{:.1%}"),
                column("optimizer", "optimizer_share", "{:.2%}"),
                column("over 10", "speedup", "{:.2f}"),
                *over_pytorch(rates),
                _study("study: ms", "ms/micro-step"),
                _study("/s", "micro-steps/s"),
                _study("compiling", "compiling, %", "{}%"),
                _study("over 10", "speedup"),
            ),
            "Milliseconds are without the wait for a compilation, rates with it. The study: "
            "stories110M on an M1 Pro; its milliseconds stand next to ours and are not compared. "
            "Through ML Programs every update waits for its compilation, and they are evaluated "
            "on this CPU; 0 updates timed: computed as K / (K step + compile). The study's row of "
            "500 is so, too." + (ENGINE_ROWS if any(map(_is_engine, rates)) else ""),
        ]
    if made := [row for row in record["rows"] if "when" in row]:
        parts += [
            "## What is made of the weights on the GPU",
            table_of(made, CASE, *median_and_spread("ms"), column("when", "when")),
        ]
    if learnt := [row for row in record["rows"] if "rule" in row]:
        parts += [
            "## What they cost in learning",
            table_of(
                learnt,
                ("", lambda row: row["case"].removeprefix("learning ")),
                column("rate at its highest", "rate", "{:.2g}"),
                column("updates", "updates"),
                column("tokens", "tokens", "{:,}"),
                column("validation loss, nats", "ours", "{:.4f}"),
                column("seeds", "n"),
                ("least to most", lambda row: f"{row['range']:.4f}" if row["n"] > 1 else "-"),
            ),
            "Equally many tokens for every row. Rules scale the rate of 10 micro-steps an update; "
            "no row's rate was searched for. The study trained on synthetic data and measured no "
            "loss.",
        ]
    return document(record, "Micro-steps an update, on", *parts)


def _study(head: str, figure: str, form: str = "{}") -> Column:
    """A column of the study's figures of as many micro-steps an update."""

    def cell(row: Row) -> str:
        theirs = PUBLISHED.get(f"accum-{row['accum']}")
        return "-" if theirs is None else form.format(theirs.values[figure])

    return head, cell


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Rates over 10 micro-steps', and the losses."""
    rates = series(record)
    if not rates:
        return None
    title = f"Micro-steps an update, {record['device']}"
    figure, (left, right) = plots.panels(2, 5.5, 4.2, title)
    for name, rows in rates.items():
        left.plot([r["accum"] for r in rows], [r["speedup"] for r in rows], "o-", label=name)
    theirs = [published(key, "speedup") for key in KEYS]
    left.plot(
        [int(PUBLISHED[key].row) for key in KEYS],
        theirs,
        "k--",
        marker="x",
        label="study, M1 Pro's Neural Engine",
    )
    learnt = sorted((r for r in record["rows"] if "rule" in r), key=lambda row: row["accum"])
    for rule in dict.fromkeys(row["rule"] for row in learnt if row["rule"] != "any"):
        shown = [row for row in learnt if row["rule"] in (rule, "any")]
        right.plot([r["accum"] for r in shown], [r["ours"] for r in shown], "o-", label=rule)
    what = "micro-steps an update"
    plots.label(left, what, "micro-steps/s, over those of 10 an update", log="xy")
    plots.label(right, what, "validation loss after as many tokens, nats", log="x")
    return figure
