"""Findings of rms-norm and rms-norm-threshold about the published rule of RMSNorm.

The published speedups are of Liger's block path over Liger's row path. Here the same two are
compared, and the reason names what onelaunch's own kernel takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core.findings import LEAST_GAIN_SHARE, Finding
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits
from onelaunch.bench.studies.block_row import paths
from onelaunch.operators.rms_norm.plan import BLOCK_ROW_MAX_BLOCK_SIZE

NO_CHANGE = 0.02
"""How near to 1 a ratio is of two paths that should be the same one: the published widths above
the rule's, which are its control, differ by up to a hundredth."""
ROWS_FACTOR = 2.0
"""How far the row count of the rule may be off: the counts measured are powers of 2."""
SENTENCE = f"the lowest row count where every pass wins, up to {BLOCK_ROW_MAX_BLOCK_SIZE}"
_PUBLISHED_ROWS = f"{PUBLISHED['norm-rows'].values['rows']:,} rows"
_PASSES = {"both": "full", "backward": "backward", "forward": "forward"}
KEYS = tuple(key for key in PUBLISHED if key.startswith("norm-") and key != "norm-rows")


def findings(record: dict[str, Any]) -> list[Finding]:
    """A finding for every published shape that the record has, kernels only."""
    rows = {row["case"]: row for row in record["rows"]}
    if not any(case.endswith(" gpu") for case in rows):
        return [_elsewhere(KEYS, "the block path is faster than the row path")] if rows else []
    findings: list[Finding] = []
    for key in KEYS:
        pass_, count, width = key.removeprefix("norm-").split("-")
        if row := rows.get(f"{count}x{width} {_PASSES[pass_]} gpu"):
            findings += _of_shape(key, int(width), row)
    return findings


def _of_shape(key: str, width: int, row: dict[str, Any]) -> Iterator[Finding]:
    peers, published = row["peers"], PUBLISHED[key]
    if not {"liger row", "liger source"} <= peers.keys():
        return
    by_row, by_source = peers["liger row"], peers["liger source"]
    if "saved, %" in published.values:
        theirs, ours = float(published.values["saved, %"]), 100 * (1 - by_source / by_row)
        confirmed = ours >= LEAST_GAIN_SHARE * theirs
        values = f"{theirs:g}% saved", f"{abs(ours):.1f}% {'saved' if ours >= 0 else 'more'}"
    else:
        theirs, ours = float(published.values["speedup"]), by_row / by_source
        confirmed = ours - 1 >= LEAST_GAIN_SHARE * (theirs - 1)
        if width > BLOCK_ROW_MAX_BLOCK_SIZE:
            confirmed = abs(ours - 1) <= NO_CHANGE
        values = f"{theirs:.2f}x", f"{ours:.2f}x"
    control = ", beyond the rule's widths: no change" if width > BLOCK_ROW_MAX_BLOCK_SIZE else ""
    yield Finding(
        (key,),
        f"{published.row}, {published.table.removeprefix('RMSNorm, ')}: Liger's block path against "
        f"its row path{control}",
        *values,
        "confirmed" if confirmed else "refuted",
        f"{digits(by_row)} us and {digits(by_source)} us, kernels only; ours {digits(row['ours'])} "
        f"us, {by_row / row['ours']:.2f}x Liger's row path",
        ours / theirs,
    )


def sentence_findings(record: dict[str, Any]) -> list[Finding]:
    """Findings on the lowest row count at which every pass wins, 16 rows a tile against one row:
    our kernels in that form, and Liger's own."""
    if not record["rows"]:
        return []
    if not any(row["case"].endswith(" gpu") for row in record["rows"]):
        return [_elsewhere(("norm-rows",), SENTENCE)]
    findings = []
    for key in ("source", "liger"):
        pair = paths.PAIRS[key]
        if ratios := paths.ratios_of(record, pair):
            findings.append(_of_sentence(ratios, pair.label))
    if findings:
        return findings
    why = "the record has our tuned tiles alone, which are not the sentence's"
    return [Finding(("norm-rows",), SENTENCE, _PUBLISHED_ROWS, "", "not applicable", why)]


def _of_sentence(ratios: paths.Ratios, label: str) -> Finding:
    """The finding of one pair of paths."""
    published = int(PUBLISHED["norm-rows"].values["rows"])
    rows = paths.wins_from(ratios, paths.PASSES, paths.WIDTHS)
    near = rows is not None and 1 / ROWS_FACTOR <= rows / published <= ROWS_FACTOR
    alone = {p: paths.wins_from(ratios, (p,), paths.WIDTHS) for p in paths.PASSES}
    each = ", ".join(
        f"{pass_} from {'no count on' if count is None else f'{count:,} rows on'}"
        for pass_, count in alone.items()
    )
    losers = paths.losers_at(ratios, published)
    at = f"; at {published:,} rows do not win: {', '.join(losers)}" if losers else ""
    return Finding(
        ("norm-rows",),
        f"{SENTENCE}: {label}",
        _PUBLISHED_ROWS,
        f"{rows:,} rows" if rows is not None else "none",
        "confirmed" if near else "refuted",
        f"widths 64 to {BLOCK_ROW_MAX_BLOCK_SIZE}: {each}{at}",
        rows / published if rows is not None else None,
    )


def _elsewhere(keys: tuple[str, ...], claim: str) -> Finding:
    why = "on a CPU there is no kernel with a row path and a block path: the plain form was timed"
    return Finding(keys, claim, "measured on a GPU", "", "not applicable", why)
