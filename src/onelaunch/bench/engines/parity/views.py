"""Findings, table and plot of a record of parity."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding
from onelaunch.bench.core.tables import Cell, by_columns, document, figure

MOST_TIMES = 2.0
"""What an engine may lose, times what PyTorch does in the same precision: sums of other order and
other points of rounding differ by less."""
MOST_APART = {"float32": 1e-2, "float16": 5e-2}
"""Of gradients through ML Programs, all of them together: programs hold weights in float16, a
relative 5e-4 each, which either precision passes on; in float16 every operation rounds as well."""
FLOAT16_END = 65_504


def findings(record: dict[str, Any]) -> list[Finding]:
    """Nothing here was published: what the record says of our own engines."""
    findings = []
    for row in record["rows"]:
        what, engine, dtype = row["what"], row.get("engine"), row.get("dtype")
        if what == "logits" and engine != "reference":
            findings.append(
                _as_pytorch(
                    row,
                    f"the {engine} engine in {dtype} loses",
                    "PyTorch does",
                    "relative error of all logits against float64; the most likely token is the "
                    f"same at {row['same_argmax']:.1%} of positions",
                )
            )
        elif what == "gradients":
            together = f"{row['parameters']} parameters together against float64 autograd"
            worst = f"the worst, {row['worst']}, {row['worst_error']:.1e}"
            if engine != "coreml":
                why = (
                    f"{together}, norm {row['norm']}; {worst}, PyTorch's {row['worst_pytorch']:.1e}"
                )
                who = f"gradients of training in {dtype} lose"
                findings.append(_as_pytorch(row, who, "PyTorch's do", why))
            else:
                most = MOST_APART[row["dtype"]]
                claim = f"gradients through ML Programs in {dtype} are within {most:g}"
                why = f"{together}; {worst}"
                findings.append(_ours(claim, f"{row['ours']:.1e}", row["ours"] <= most, why))
    magnitudes = [row for row in record["rows"] if row["what"] == "magnitude"]
    for model in dict.fromkeys(row["model"] for row in magnitudes):
        most = max((r for r in magnitudes if r["model"] == model), key=lambda row: row["ours"])
        findings.append(
            _ours(
                f"{model}: no operation of a forward program comes near float16's end",
                f"{most['ours']:,.0f} of {FLOAT16_END:,} ({most['kind']})",
                not most["beyond"],
                f"random weights, evaluated in float32; {most['beyond']} operations pass a limit "
                "that the linter knows; the mask of attention is meant to be large",
            )
        )
    return findings


def _ours(claim: str, ours: str, confirmed: bool, why: str, ratio: float | None = None) -> Finding:
    """A statement that no study published."""
    return Finding(
        (), claim, "not measured", ours, "confirmed" if confirmed else "refuted", why, ratio
    )


def _as_pytorch(row: dict[str, Any], who: str, pytorch: str, why: str) -> Finding:
    """Whether an engine loses as little as PyTorch in the same precision."""
    return _ours(
        f"{row['model']}: {who} no more than {MOST_TIMES:g} times what {pytorch}",
        f"{row['ours']:.1e}, PyTorch {row['peers']['PyTorch']:.1e}",
        row["times_pytorch"] <= MOST_TIMES,
        why,
        row["times_pytorch"],
    )


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['engine']} {row['dtype']}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


SECTIONS: dict[str, tuple[str, dict[str, Cell], str]] = {
    "logits": (
        "Logits of every position",
        {
            "logits": _name, "error": figure("ours", form=".2e"),
            "PyTorch": figure("peers", "PyTorch", form=".2e"),
            "times": figure("times_pytorch", form=_times),
            "largest of one": figure("largest", form=".2e"),
            "same token": figure("same_argmax", form=".1%"),
        },
        "Relative, all logits together, random weights. PyTorch has the engine's precision: "
        "bfloat16 of the CPU engine is its weights', an ML Program's weights are float16.",
    ),
    "gradients": (
        "Gradients of every parameter",
        {
            "gradients": figure("case", form=str), "error": figure("ours", form=".2e"),
            "PyTorch": lambda row: f"{next(iter(row['peers'].values())):.2e}",
            "times": figure("times_pytorch", form=_times),
            "worst parameter": lambda row: f"{row['worst']} {row['worst_error']:.2e}",
        },
        "Relative, all parameters together, of one sequence and random weights. Training with the "
        "reference engine is as `onelaunch train` does it: weights in float32, bfloat16 by "
        "autocast, the norm that it chooses here; PyTorch's is the same with PyTorch's norm. "
        "Compared with coreml, training through ML Programs, PyTorch computes in float32 with "
        "their weights, which are float16.",
    ),
    "magnitude": (
        "The largest magnitude by kind of operation",
        {
            "ML Program of a forward": lambda row: f"{row['model']}, {row['kind']}",
            "largest": figure("ours", form=",.3g"),
            "of float16's end": figure("of_float16", form=".2%"),
        },
        "The mask, -40,000, is added to scores: it is meant to be large.",
    ),
}  # fmt: skip
"""By what the rows are of: a title, columns, a note."""


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = []
    for what, (title, columns, note) in SECTIONS.items():
        if rows := [row for row in record["rows"] if row["what"] == what]:
            parts += [f"## {title}", by_columns(rows, columns), note]
    return document(record, "Errors against float64, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Errors of logits, ours and PyTorch's in the same precision."""
    rows = {_name(row): row for row in record["rows"] if row["what"] == "logits"}
    return plots.bars(
        f"Errors by engine and precision, {record['device']}",
        {
            "the engine": {name: row["ours"] for name, row in rows.items()},
            "PyTorch": {name: row["peers"]["PyTorch"] for name, row in rows.items()},
        },
        "relative error of logits against float64", "", across=True, log="x",
    )  # fmt: skip
