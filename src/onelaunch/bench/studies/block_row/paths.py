"""The published sentence "4096 is the lowest row count where every pass wins", tested on its own
subject: tiles of 16 rows against one row a program, each pass, widths 64 to 512.

It is tested on three pairs of paths: our kernels by the published rule's tile, Liger's own two
paths where Liger is installed, and our tuned kernels. Pure functions of the record's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onelaunch.bench.core.tables import markdown
from onelaunch.bench.studies.block_row.norm_cell import PASSES, shape_of

TIE = 0.01  # ratios as near to 1 as this come out on either side from run to run

WIDTHS = (64, 128, 256, 512)
ROWS = tuple(2**n for n in range(9, 16))  # 512 to 32,768

Ratios = dict[str, dict[tuple[int, int], float]]
"""By pass, then by (rows, columns)."""


@dataclass(frozen=True)
class Pair:
    """Two paths by their names in a record: several rows a program, and one."""

    block: str
    row: str
    label: str


PAIRS = {
    "source": Pair("source block", "source row", "our kernels, 16 rows a tile against one row"),
    "liger": Pair("liger block", "liger row", "Liger's block path against its row path"),
    "tuned": Pair("ours", "row", "our tuned tiles against one row"),
}


def verdict(ratio: float | None) -> str:
    """The verdict on block time over row time: wins, tie, or loses, as a pass that was not timed
    does."""
    if ratio is None or ratio > 1 + TIE:
        return "loses"
    return "wins" if ratio < 1 - TIE else "tie"


def ratios_of(record: Mapping[str, Any], pair: Pair) -> Ratios:
    """Block time over row time, of the widths and row counts of the sentence."""
    ratios: Ratios = {}
    for pass_ in PASSES:
        for row in record["rows"]:
            rows, columns = shape_of(row)
            if (
                row["case"].split()[1:] != [pass_, "gpu"]
                or rows not in ROWS
                or columns not in WIDTHS
            ):
                continue
            times = {"ours": row["ours"], **row.get("forms", {}), **row["peers"]}
            if pair.block in times and times.get(pair.row):
                ratios.setdefault(pass_, {})[rows, columns] = times[pair.block] / times[pair.row]
    return ratios


def wins_from(
    ratios: Ratios, passes: Sequence[str], widths: Sequence[int], ties: bool = False
) -> int | None:
    """The lowest row count from which on, there and at every larger count, all of these passes win
    at all of these widths; None where there is none. With `ties` a tie ends it no more than a win
    does, and at the lowest count one of them must win."""
    lowest = None
    shapes = {shape for by_shape in ratios.values() for shape in by_shape}
    for count in sorted({rows for rows, width in shapes if width in widths}, reverse=True):
        verdicts = {
            verdict(ratios.get(pass_, {}).get((count, width)))
            for pass_ in passes
            for width in widths
        }
        if "loses" in verdicts or ("tie" in verdicts and not ties):
            break
        if "wins" in verdicts:
            lowest = count
    return lowest


def losers_at(ratios: Ratios, count: int) -> list[str]:
    """The passes that do not win at a row count, each with its width and ratio."""
    return [
        f"{pass_} at {width} ({'not timed' if ratio is None else f'{ratio:.2f}'})"
        for pass_ in PASSES
        for width in WIDTHS
        if verdict(ratio := ratios.get(pass_, {}).get((count, width))) != "wins"
    ]


def tables(record: Mapping[str, Any]) -> list[str]:
    """The record's tables in Markdown: for each pair that the record has, from how many rows on it
    wins, by pass and width, and the ratios behind that."""
    parts: list[str] = []
    passes = [*((pass_,) for pass_ in PASSES), PASSES]
    for pair in PAIRS.values():
        ratios = ratios_of(record, pair)
        if not ratios or (pair is PAIRS["tuned"] and not parts):
            continue  # the tuned pair alone is the first table's
        lines = [
            [name, *(_count(wins_from(ratios, each, widths)) for each in passes)]
            for name, widths in (*((str(width), (width,)) for width in WIDTHS), ("all", WIDTHS))
        ]
        header = ["columns", *PASSES, "every pass"]
        parts.append(f"## {pair.label}: wins from so many rows on")
        parts.append(markdown(header, lines))
        if pair is PAIRS["tuned"]:
            continue
        counts = sorted({rows for by_shape in ratios.values() for rows, _ in by_shape})
        for pass_, by_shape in ratios.items():
            parts.append(f"### {pass_}, {pair.label}: time of the one / time of the other")
            parts.append(ratio_table(by_shape, counts, WIDTHS))
    return parts


def ratio_table(
    by_shape: Mapping[tuple[int, int], float], counts: Sequence[int], widths: Sequence[int]
) -> str:
    """Ratios with their verdicts, rows by columns."""
    lines = [[f"{c}", *(_judged(by_shape.get((c, width))) for width in widths)] for c in counts]
    return markdown(["rows", *map(str, widths)], lines)


def _count(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"


def _judged(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} {verdict(ratio)}"
