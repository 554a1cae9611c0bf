"""What the records of rms-norm and rms-norm-threshold say about the published rule of RMSNorm.

The published speedups are of Liger's block path over Liger's row path. Here the same two are held
against each other, and beside them stands what onelaunch's own kernel takes of the row path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.findings import Finding, Verdict
from onelaunch.bench.published import PUBLISHED
from onelaunch.bench.tables import figure as digits
from onelaunch.operators.rms_norm.plan import BLOCK_ROW_MAX_BLOCK_SIZE

LEAST_GAIN_SHARE = 0.5
"""Of a published gain, that is speedup less 1, or percent saved: from so much of it on it is
confirmed. The device is another one, so half its size is asked for, not only its direction."""
NO_CHANGE = 0.02
"""How near to 1 a ratio is of two paths that should be the same one: the published widths above
the rule's, which are its control, differ by up to a hundredth."""
ROWS_FACTOR = 2.0
"""How far the row count of the rule may be off: the counts measured are powers of 2."""
_PASSES = {"both": "full", "backward": "backward", "forward": "forward"}
KEYS = tuple(key for key in PUBLISHED if key.startswith("norm-") and key != "norm-rows")


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of every published shape that the record has, kernels only."""
    rows = {row["case"]: row for row in record["rows"]}
    if not any(case.endswith(" gpu") for case in rows):
        return [_elsewhere(KEYS, "the block path is faster than the row path")] if rows else []
    found: list[Finding] = []
    for key in KEYS:
        pass_, count, width = key.removeprefix("norm-").split("-")
        row = rows.get(f"{count}x{width} {_PASSES[pass_]} gpu")
        if row is not None:
            found += _of_shape(key, int(width), row)
    return found


def _of_shape(key: str, width: int, row: dict[str, Any]) -> Iterator[Finding]:
    peers, published = row["peers"], PUBLISHED[key]
    if not {"liger row", "liger source"} <= peers.keys():
        return
    by_row, by_source = peers["liger row"], peers["liger source"]
    verdict: Verdict
    if "saved, %" in published.values:
        theirs, ours = float(published.values["saved, %"]), 100 * (1 - by_source / by_row)
        verdict = "confirmed" if ours >= LEAST_GAIN_SHARE * theirs else "refuted"
        told = f"{theirs:g}% saved", f"{abs(ours):.1f}% {'saved' if ours >= 0 else 'more'}"
    else:
        theirs, ours = float(published.values["speedup"]), by_row / by_source
        if width > BLOCK_ROW_MAX_BLOCK_SIZE:
            verdict = "confirmed" if abs(ours - 1) <= NO_CHANGE else "refuted"
        else:
            enough = ours - 1 >= LEAST_GAIN_SHARE * (theirs - 1)
            verdict = "confirmed" if enough else "refuted"
        told = f"{theirs:.2f}x", f"{ours:.2f}x"
    control = ", beyond the rule's widths: no change" if width > BLOCK_ROW_MAX_BLOCK_SIZE else ""
    yield Finding(
        (key,),
        f"{published.row}, {published.table.removeprefix('RMSNorm, ')}: Liger's block path against "
        f"its row path{control}",
        *told,
        verdict,
        f"{digits(by_row)} us and {digits(by_source)} us, kernels only; ours {digits(row['ours'])} "
        f"us, {by_row / row['ours']:.2f}x Liger's row path",
        ours / theirs,
    )


def threshold_finding(rows: int | None, on_gpu: bool) -> Finding:
    """Of the lowest row count from which the block path pays, for all of the rule's widths."""
    published = float(PUBLISHED["norm-rows"].values["rows"])
    claim = f"several rows in a program pay from so many rows on, up to {BLOCK_ROW_MAX_BLOCK_SIZE}"
    if not on_gpu:
        return _elsewhere(("norm-rows",), claim)
    near = rows is not None and 1 / ROWS_FACTOR <= rows / published <= ROWS_FACTOR
    return Finding(
        ("norm-rows",),
        claim,
        f"{published:,.0f} rows",
        f"{rows:,} rows" if rows is not None else "none",
        "confirmed" if near else "refuted",
        "our block path against our row path: no pass of any width loses from there on",
        rows / published if rows is not None else None,
    )


def _elsewhere(keys: tuple[str, ...], claim: str) -> Finding:
    return Finding(
        keys,
        claim,
        "measured on a GPU",
        "",
        "not applicable",
        "on a CPU there is no kernel with a row path and a block path: the plain form was timed",
    )
