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
    widths = [max(2, *(len(row[i]) for row in (header, *body))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(line(cells) for cells in (header, rule, *body))


def digits(value: float | None) -> str:
    """Three digits, more where they stand before the point; a dash for nothing."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(row: Mapping[str, Any], form: Callable[[float], str] = digits, scale: float = 1) -> str:
    """From the 20th to the 80th percentile of a row, times `scale`; a dash for none."""
    return "-".join(form(scale * end) for end in row.get("spread") or ()) or "-"


def document(record: dict[str, Any], title: str, *parts: str) -> str:
    """A record's page in Markdown: its title, which the device ends, where its figures come from,
    and its parts."""
    head = f"# {title} {record['device']}"
    return "\n\n".join([head, provenance(record), *parts]) + "\n"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers, at least one."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def provenance(record: dict[str, Any]) -> str:
    """What the figures of a record come from, in a line; a second line warns where its rows are of
    several commits."""
    rows = record["rows"]
    words = [str(record["device"])]
    words += [str(record[key]) for key in ("date",) if key in record]
    words += [f"commit {record['commit']}"] if "commit" in record else []
    words += [f"{name} {version}" for name, version in record.get("versions", {}).items()]
    words += _spread_of(rows, "dtype", "{}")
    words += _spread_of(rows, "copy_GBps", "copy {:,.0f} GB/s")
    words += _spread_of(rows, "n", "n = {}")
    lines = ["; ".join(words) + "."]
    commits = Counter(str(row["commit"]) for row in rows if "commit" in row)
    if len(commits) > 1:
        told = ", ".join(f"{count} of {commit}" for commit, count in commits.items())
        lines.append(f"Warning: the rows are not of one commit: {told}.")
    return "\n\n".join(lines)


def _spread_of(rows: Sequence[dict[str, Any]], key: str, form: str) -> list[str]:
    """What the rows of a case with a spread say under `key`: one value, or least and most."""
    found = sorted({row[key] for row in rows if row.get(key) is not None and row.get("spread")})
    if not found:
        return []
    ends = found if len(found) == 1 else [found[0], found[-1]]
    return [" to ".join(form.format(end) for end in ends)]
