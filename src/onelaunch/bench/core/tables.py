"""Tables in Markdown that can be read on a terminal as they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table, its columns aligned: the first, or as many as `left`, to the left, the others to the
    right."""
    body = [list(row) for row in rows]
    # a rule to the right is a dash and a colon at least
    widths = [max(2, *map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(line(cells) for cells in (header, rule, *body))


Cell = Callable[[Any], str]
"""The text of a row's cell."""


def by_columns(rows: Iterable[Any], columns: Mapping[str, Cell], left: int = 1) -> str:
    """A table of rows, of whatever kind: each column's name, and what makes its cell of a row."""
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows], left)


def figure(*keys: str, form: Callable[[Any], str] | str | None = None) -> Cell:
    """A cell with the value that a row has under these keys, one inside the other; a dash where it
    has none. `form` is a function or a format such as ".2f"; without one, `digits`."""

    def cell(row: Any) -> str:
        for key in keys:
            row = row.get(key) if row is not None else None
        if row is None:
            return "-"
        if isinstance(form, str):
            return format(row, form)
        return (form or digits)(row)

    return cell


def digits(value: float | None) -> str:
    """Three digits, more where they are before the point; a dash for nothing."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(row: Mapping[str, Any], form: Callable[[float], str] = digits, scale: float = 1) -> str:
    """The range from the 20th to the 80th percentile of a row, times `scale`; a dash for none."""
    return "-".join(form(scale * end) for end in row.get("spread") or ()) or "-"


def document(record: dict[str, Any], title: str, *parts: str) -> str:
    """A record's page in Markdown: its title, which the device ends, where its figures come from,
    and its parts."""
    head = f"# {title} {record['device']}"
    return "\n\n".join([head, provenance(record), *parts]) + "\n"


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers, at least one."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


_OF_A_RECORD = {"date": "{}", "commit": "commit {}"}
_OF_ITS_ROWS = {"dtype": "{}", "copy_GBps": "copy {:,.0f} GB/s", "n": "n = {}"}


def provenance(record: dict[str, Any]) -> str:
    """The origin of a record's figures, in a line; a second line warns where its rows are of
    several commits."""
    rows = record["rows"]
    words = [str(record["device"])]
    words += [form.format(record[key]) for key, form in _OF_A_RECORD.items() if key in record]
    words += [f"{name} {version}" for name, version in record.get("versions", {}).items()]
    for key, form in _OF_ITS_ROWS.items():
        values = {row[key] for row in rows if row.get(key) is not None and row.get("spread")}
        if values:
            ends = dict.fromkeys((min(values), max(values)))
            words.append(" to ".join(map(form.format, ends)))
    lines = ["; ".join(words) + "."]
    commits = Counter(str(row["commit"]) for row in rows if "commit" in row)
    if len(commits) > 1:
        counts = ", ".join(f"{count} of {commit}" for commit, count in commits.items())
        lines.append(f"Warning: the rows are not of one commit: {counts}.")
    return "\n\n".join(lines)
