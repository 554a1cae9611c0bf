"""Table, plot and findings of a record of step-breakdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import (
    Finding,
    Verdict,
    below,
    needs_a_mac,
    standard_error,
    unless,
    without_evaluated_seconds,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown, spread
from onelaunch.bench.core.views import CASE, column, median_and_spread, published, table_of
from onelaunch.bench.studies.ane_mega_kernel.step_breakdown.step_parts import (
    BESIDE,
    EVALUATING,
    HEAD,
    UNEXPLAINED,
    WHOLE,
)

MS = "{:.3f}".format
THEIR_WHOLE = published("part-whole", "ms")
NEAR = 0.1
"""Of the micro-step: forward and backward this near to the published shares are the same statement,
as models and devices differ."""
ADDS_UP = 0.02
"""Of the micro-step: parts that leave more than this unexplained do not add up to it."""


def _all(direction: str) -> tuple[str, ...]:
    return tuple(f"{direction}: {kind}" for kind in EVALUATING)


GROUPS: dict[str, tuple[str, ...]] = {
    "part-forward-eval": _all("forward"),
    "part-forward-io": ("forward: conversions",),
    "part-forward-classifier": ("forward: classifier",),
    "part-forward-elementwise": ("forward: rows and taps", "forward: norm and loss"),
    "part-backward-eval": _all("backward"),
    "part-backward-io": ("backward: conversions",),
    "part-backward-classifier": ("backward: classifier",),
    "part-backward-cpu": ("backward: copies and sums",),
}
"""The parts here that are a row of the study's."""
Shares = dict[str, dict[str, Any]]
"""The rows of what was timed, by part."""


def cases(record: dict[str, Any]) -> dict[str, Shares]:
    """The rows by case."""
    by_case: dict[str, Shares] = {}
    for row in record["rows"]:
        if "part" in row:
            by_case.setdefault(row["of"], {})[row["part"]] = row
    return by_case


def _halves(rows: Shares) -> dict[str, tuple[str, ...]]:
    """The parts of forward and backward."""
    return {
        f"part-{direction}": tuple(name for name in rows if name.startswith(f"{direction}: "))
        for direction in ("forward", "backward")
    }


def _groups(rows: Shares) -> dict[str, list[dict[str, Any]]]:
    """Our rows by the study's row: halves, and their parts where ML Programs are
    evaluated."""
    names = _halves(rows) | (GROUPS if BESIDE in rows else {})
    return {key: [rows[name] for name in parts if name in rows] for key, parts in names.items()}


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings by case: shares next to the study's, and whether parts add up to the whole."""
    results = []
    for case, rows in cases(record).items():
        results.append(_sum(case, rows))
        results += [_share(case, key, group, rows) for key, group in _groups(rows).items()]
    return [*without_evaluated_seconds([*results, *_products(record)]), *_mega(record)]


def _share(case: str, key: str, group: list[dict[str, Any]], rows: Shares) -> Finding:
    """Halves are to be near the study's; those of an engine of ours are without the classifier,
    and have no verdict. Parts of halves are separate in the evaluation of ML Programs alone, and
    have none either."""
    ms, theirs = published(key, "ms"), published(key, "ms") / THEIR_WHOLE
    share = sum(row["share"] for row in group)
    words = PUBLISHED[key].values.get("told")
    verdict: Verdict = "not applicable"
    why = ""
    if HEAD in rows:
        why = f"classifier and loss are one part here, {rows[HEAD]['share']:.1%}, of neither half"
    elif key in _halves(rows):
        errors = (standard_error(row["spread"], row["n"]) for row in group)
        error = math.hypot(*errors) / rows[WHOLE]["ours"]
        verdict = below(abs(share - theirs), NEAR, error)
        why = f"within {100 * NEAR:g} points is confirmed{unless(verdict)}"
    return Finding(
        (key,),
        f"{case}: the share of {PUBLISHED[key].row} in a micro-step",
        f"{theirs:.1%} ({ms:g} ms)" + (f"; {words}" if words else ""),
        f"{share:.1%} ({sum(row['ours'] for row in group):.2f} ms), measured",
        verdict,
        why,
        share / theirs,
    )


def _sum(case: str, rows: Shares) -> Finding:
    left = rows[UNEXPLAINED]["share"]
    parts = [f"part-backward-{name}" for name in ("eval", "io", "classifier", "cpu")]
    lost = published("part-backward", "ms") - sum(published(key, "ms") for key in parts)
    return Finding(
        ("part-whole",),
        f"{case}: the parts add up to the micro-step",
        f"{THEIR_WHOLE:g} ms; the estimates leave {lost:.1f} ms of the backward "
        f"({lost / THEIR_WHOLE:.0%} of the micro-step) unattributed",
        f"{rows[WHOLE]['ours']:.2f} ms, {left:.2%} of it unattributed",
        "confirmed" if abs(left) < ADDS_UP else "refuted",
        f"within {ADDS_UP:.0%} is confirmed",
    )


def _products(record: dict[str, Any]) -> Iterator[Finding]:
    """At each depth: where one program goes through all layers, nothing is left to compute during
    it when their gradients are known."""
    for row in record["rows"]:
        if "depth" in row:
            yield Finding(
                ("part-backward-dw",),
                f"{row['case']}: the weights' gradients are computed during the backward, which "
                "hardly waits for them",
                "29 ms meanwhile, 0.005 ms of waiting",
                f"{row['products']:.2f} ms meanwhile, {row['product_wait']:.2f} ms of waiting "
                f"({row['product_wait'] / row['ours']:.1%} of the micro-step)",
                "not applicable",
                "",
            )


def _mega(record: dict[str, Any]) -> Iterator[Finding]:
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if "depth" in row:
            by_case.setdefault(row["case"].split(",")[0], {})[row["depth"]] = row
    for case, rows in by_case.items():
        if not {"half", "all layers"} <= rows.keys():
            continue
        half, whole = rows["half"], rows["all layers"]
        evaluating = (row["forward_programs"] + row["backward_programs"] for row in (half, whole))
        yield Finding(
            ("backward-mega",),
            f"{case}: forward and backward in one program each, over two a layer",
            "projected: about 2x of the programs' time",
            f"{next(evaluating) / next(evaluating):.2f}x of the programs' time, "
            f"{half['ours'] / whole['ours']:.2f}x of the micro-step",
            *needs_a_mac(
                f"{half['programs']} programs become {whole['programs']}, which saves as many "
                "calls; here none has the price of a call to a Neural Engine, and these seconds "
                "are of an evaluator"
            ),
        )


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = []
    for case, rows in cases(record).items():
        whole = rows[WHOLE]
        note = (
            f"{whole['micro_steps']} micro-steps an update share one optimizer step. What no part "
            f"explains: {rows[UNEXPLAINED]['share']:.2%}."
        )
        if BESIDE in rows:
            note += (
                f" Without the clocks {digits(whole['without_clocks'])} ms. The weights' gradients "
                "are computed in another thread meanwhile, and are no part of the sum; programs "
                "are evaluated on this CPU and kept: nothing is compiled."
            )
        elif HEAD in rows:
            note += f" Without the marks {digits(whole['without_clocks'])} ms."
        parts += [
            f"## {case}",
            table_of(
                (rows[part] for part in _ordered(rows)),
                column("part", "part"),
                *median_and_spread("ms a micro-step", MS),
                column("share", "share", "{:.2%}"),
            ),
            note,
            *_threads(record, case),
        ]
        if HEAD not in rows:
            head = ["as the study has it", "ms", "share", "study, ms", "share"]
            parts.append(markdown(head, list(_study(rows))))
    depths = [row for row in record["rows"] if "depth" in row]
    if depths:
        parts += [
            "## By how much a program holds",
            table_of(
                depths,
                CASE,
                column("programs", "programs"),
                column("ms a micro-step", "ours", digits),
                ("p20-p80", lambda row: spread(row, MS)),
                column("forward programs, ms", "forward_programs", digits),
                column("backward programs, ms", "backward_programs", digits),
                column("weights' gradients, ms", "products", digits),
                column("waiting for them, ms", "product_wait", digits),
            ),
            "The study projected about 2x for the programs' time from fewer and larger backward "
            "programs, as each call costs about 160 us there. Milliseconds of programs are with "
            "the clocks, those of a micro-step without.",
        ]
    return document(record, "A micro-step by parts, on", *parts)


def _threads(record: dict[str, Any], case: str) -> Iterator[str]:
    """What all threads of the CPU engine did."""
    rows = [row for row in record["rows"] if "kind" in row and row["of"] == case]
    if rows:
        yield table_of(
            sorted(rows, key=lambda row: -row["ours"]),
            column("all threads together", "kind"),
            *median_and_spread("ms a micro-step", MS),
            column("share", "share", "{:.2%}"),
        )
        yield f"Shares are of the time of all {rows[0]['threads']} threads."


GROUPS_IN_ORDER = (WHOLE, "forward", HEAD, "backward", "")
"""How parts' names begin, in a table's order."""


def _place(part: str) -> int:
    group = next(i for i, name in enumerate(GROUPS_IN_ORDER) if part.startswith(name))
    return {UNEXPLAINED: group + 1, BESIDE: group + 2}.get(part, group)


def _ordered(rows: Shares) -> list[str]:
    """The whole; then forward, head, backward and the rest, the largest first in each."""
    return sorted(rows, key=lambda part: (_place(part), -rows[part]["ours"]))


def _study(rows: Shares) -> Iterator[list[str]]:
    for key, group in _groups(rows).items():
        ms, words = published(key, "ms"), PUBLISHED[key].values.get("told")
        yield [
            PUBLISHED[key].row, f"{sum(row['ours'] for row in group):.3f}",
            f"{sum(row['share'] for row in group):.1%}",
            f"{ms:g}" + (f" ({words})" if words else ""), f"{ms / THEIR_WHOLE:.1%}",
        ]  # fmt: skip


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Shares, stacked, one bar for what was timed."""
    by_case = cases(record)
    if not by_case:
        return None
    figure, (axes,) = plots.panels(1, 10, 2.4 + 0.7 * len(by_case))
    names = dict.fromkeys(
        part for rows in by_case.values() for part in _ordered(rows) if part not in (WHOLE, BESIDE)
    )
    left = [0.0] * len(by_case)
    for number, part in enumerate(sorted(names, key=_place)):
        shares = [100 * rows[part]["share"] if part in rows else 0.0 for rows in by_case.values()]
        axes.barh(
            list(by_case), shares, left=left, label=part, color=f"C{number % 10}",
            hatch=("", "//", "xx")[number // 10 % 3], edgecolor="white", linewidth=0.3,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of a micro-step, %")
    figure.legend(fontsize=7, ncols=4, loc="outside lower center")
    axes.set_title(f"A micro-step by parts, {record['device']}", fontsize=10)
    return figure
