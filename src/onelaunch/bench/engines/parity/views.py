"""What a record of parity says: findings, table, picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, Verdict
from onelaunch.bench.core.tables import document, markdown

MOST_TIMES = 2.0
"""What an engine may lose, times what PyTorch does in the same precision: sums of other order and
other points of rounding differ by less."""
MOST_APART = {"float32": 1e-2, "float16": 5e-2}
"""Of gradients through ML Programs, all of them together: programs hold weights in float16, a
relative 5e-4 each, which either precision passes on; in float16 every operation rounds as well."""
FLOAT16_END = 65_504


def findings(record: dict[str, Any]) -> list[Finding]:
    """Nothing here was published: what the record says of our own engines."""
    found = []
    for row in record["rows"]:
        of_programs = row.get("engine") == "coreml"
        if row["what"] == "logits" and row["engine"] != "reference":
            found.append(
                _beside_pytorch(
                    row,
                    f"the {row['engine']} engine in {row['dtype']} loses",
                    "PyTorch does",
                    "relative error of all logits against float64; the most likely token is the "
                    f"same at {row['same_argmax']:.1%} of positions",
                )
            )
        elif row["what"] == "gradients" and not of_programs:
            found.append(
                _beside_pytorch(
                    row,
                    f"gradients of training in {row['dtype']} lose",
                    "PyTorch's do",
                    f"{_together(row)}, norm {row['norm']}; {_worst(row)}, "
                    f"PyTorch's {row['worst_pytorch']:.1e}",
                )
            )
        elif row["what"] == "gradients":
            most = MOST_APART[row["dtype"]]
            claim = f"gradients through ML Programs in {row['dtype']} are within {most:g}"
            verdict: Verdict = "confirmed" if row["ours"] <= most else "refuted"
            why = f"{_together(row)}; {_worst(row)}"
            found.append(Finding((), claim, "not measured", f"{row['ours']:.1e}", verdict, why))
    return found + list(_by_magnitude(record))


def _beside_pytorch(row: dict[str, Any], who: str, pytorch: str, why: str) -> Finding:
    """Whether an engine loses as little as PyTorch in the same precision."""
    times = row["times_pytorch"]
    return Finding(
        (),
        f"{row['model']}: {who} no more than {MOST_TIMES:g} times what {pytorch}",
        "not measured",
        f"{row['ours']:.1e}, PyTorch {row['peers']['PyTorch']:.1e}",
        "confirmed" if times <= MOST_TIMES else "refuted",
        why,
        times,
    )


def _together(row: dict[str, Any]) -> str:
    return f"{row['parameters']} parameters together against float64 autograd"


def _worst(row: dict[str, Any]) -> str:
    return f"the worst, {row['worst']}, {row['worst_error']:.1e}"


def _by_magnitude(record: dict[str, Any]) -> Iterator[Finding]:
    rows = [row for row in record["rows"] if row["what"] == "magnitude"]
    for model in dict.fromkeys(row["model"] for row in rows):
        most = max((r for r in rows if r["model"] == model), key=lambda row: row["ours"])
        yield Finding(
            (),
            f"{model}: no operation of a forward program comes near float16's end",
            "not measured",
            f"{most['ours']:,.0f} of {FLOAT16_END:,} ({most['kind']})",
            "refuted" if most["beyond"] else "confirmed",
            f"random weights, evaluated in float32; {most['beyond']} operations pass a limit that "
            "the linter knows; the mask of attention is meant to be large",
        )


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    rows = record["rows"]
    parts = []
    logits = [row for row in rows if row["what"] == "logits"]
    gradients = [row for row in rows if row["what"] == "gradients"]
    magnitude = [row for row in rows if row["what"] == "magnitude"]
    if logits:
        lines = [
            [
                f"{row['model']}, {row['engine']} {row['dtype']}", f"{row['ours']:.2e}",
                f"{row['peers']['PyTorch']:.2e}", f"{row['times_pytorch']:.2f}x",
                f"{row['largest']:.2e}", f"{row['same_argmax']:.1%}",
            ]
            for row in logits
        ]  # fmt: skip
        header = ["logits", "error", "PyTorch", "times", "largest of one", "same token"]
        parts += [
            "## Logits of every position",
            markdown(header, lines),
            "Relative, all logits together, random weights. PyTorch has the engine's precision: "
            "bfloat16 of the CPU engine is its weights', an ML Program's weights are float16.",
        ]
    if gradients:
        lines = [
            [
                row["case"], f"{row['ours']:.2e}", *(f"{v:.2e}" for v in row["peers"].values()),
                f"{row['times_pytorch']:.2f}x" if "times_pytorch" in row else "-",
                f"{row['worst']} {row['worst_error']:.2e}",
            ]
            for row in gradients
        ]  # fmt: skip
        header = ["gradients", "error", "PyTorch", "times", "worst parameter"]
        parts += [
            "## Gradients of every parameter",
            markdown(header, lines),
            "Relative, all parameters together, of one text and random weights. Training with the "
            "reference engine is as `onelaunch train` does it: weights in float32, bfloat16 by "
            "autocast, the norm that it chooses here; PyTorch's is the same with PyTorch's norm. "
            "Beside coreml, training through ML Programs, PyTorch computes in float32 with their "
            "weights, which are float16.",
        ]
    if magnitude:
        lines = [
            [f"{row['model']}, {row['kind']}", f"{row['ours']:,.3g}", f"{row['of_float16']:.2%}"]
            for row in magnitude
        ]
        parts += [
            "## The largest magnitude by kind of operation",
            markdown(["ML Program of a forward", "largest", "of float16's end"], lines),
            "The mask, -40,000, is added to scores: it is meant to be large.",
        ]
    return document(record, "Errors against float64, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Errors of logits, ours and PyTorch's in the same precision."""
    rows = {
        f"{row['model']}, {row['engine']} {row['dtype']}": row
        for row in record["rows"]
        if row["what"] == "logits"
    }
    return plots.bars(
        f"Errors by engine and precision, {record['device']}",
        {
            "the engine": {name: row["ours"] for name, row in rows.items()},
            "PyTorch": {name: row["peers"]["PyTorch"] for name, row in rows.items()},
        },
        "relative error of logits against float64", "", across=True, log="x",
    )  # fmt: skip
