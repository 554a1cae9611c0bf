"""What the views of records share: published figures by key, and tables whose columns are data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, markdown, spread

Column = tuple[str, Callable[[Any], str]]
"""A column's head, and what stands in it for a row."""


def published(key: str, figure: str) -> float:
    """A figure of a published row, in the unit that its name ends with."""
    return float(PUBLISHED[key].values[figure])


def statement(key: str) -> str:
    """The words of a published row."""
    return str(PUBLISHED[key].values["told"])


def column(
    head: str, key: str, form: str | Callable[[Any], str] = "{}", scale: float | None = None
) -> Column:
    """A column of what rows have under a key, times `scale`: as a format string or a function
    writes it; a dash where a row has nothing there."""
    write = form.format if isinstance(form, str) else form

    def cell(row: Mapping[str, Any]) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        return write(value if scale is None else scale * value)

    return head, cell


def median_and_spread(
    head: str, form: str | Callable[[float], str] = digits, scale: float = 1
) -> tuple[Column, Column]:
    """Two columns: the rows' medians, and from their 20th to their 80th percentile."""
    write = form.format if isinstance(form, str) else form
    return column(head, "ours", write, scale), ("p20-p80", lambda row: spread(row, write, scale))


def over_pytorch(rows: Iterable[Mapping[str, Any]]) -> list[Column]:
    """A column of how many times as fast as PyTorch each row is; none where no row was compared."""
    if not any("over_pytorch" in row for row in rows):
        return []
    return [column("over PyTorch", "over_pytorch", "{:.2f}")]


CASE, N = column("", "case"), column("n", "n")


def table_of(rows: Iterable[Any], *columns: Column, left: int = 1) -> str:
    """A table in Markdown, a line for each row; the first `left` columns are aligned left."""
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return markdown([head for head, _ in columns], lines, left)
