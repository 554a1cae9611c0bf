"""Our own Markdown as HTML: headings, paragraphs, lists, tables; bold, code, links. Everything else
is text, and text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

_CODE = re.compile(r"(`[^`]+`)")
_LINK = re.compile(r"\[([^\]]+)\]\(([^()\s]+)\)")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HEADING = re.compile(r"#{1,6} .*")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_CELLS = re.compile(r"(?<!\\)\|")
_NUMBER = re.compile(
    r"[<>~]?\s*"
    r"([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?)"
    r"(?=$|[\s%;,()*]|x(?!\d)|-\d)",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def escape(text: str) -> str:
    """Text as HTML, for an attribute too."""
    return html.escape(text, quote=True)


def inline(text: str) -> str:
    """A line of Markdown as HTML."""
    return "".join(
        f"<code>{escape(piece[1:-1])}</code>" if _CODE.fullmatch(piece) else _marked(escape(piece))
        for piece in _CODE.split(text)
    )


def _marked(escaped: str) -> str:
    return _BOLD.sub(r"<strong>\1</strong>", _LINK.sub(_link, escaped)).replace("\\|", "|")


def _link(match: re.Match[str]) -> str:
    """Only to the web or to a file by its path: a record's text must not become a script."""
    text, address = match.groups()
    if _SCHEME.match(address) and not address.startswith(("https://", "http://")):
        return match[0]
    return f'<a href="{address}">{text}</a>'


def number_of(text: str) -> float | None:
    """The number that a cell is sorted by, its first: of '1,234', '12.3%', '3.4x', '0.1 to 0.2'.
    None where it begins with none, as names, dates and shapes (4096x64) do."""
    plain = re.sub(r"[*`]", "", text).strip()
    match = _NUMBER.match(plain)
    return None if match is None or _DATE.match(plain) else float(match[1].replace(",", ""))


def cell(text: str) -> str:
    """A cell of a table, with the number that it is sorted by where the text is not just that."""
    number = number_of(text)
    plain = number is None or _PLAIN_NUMBER.fullmatch(text.strip())
    key = "" if plain else f' data-n="{number:.15g}"'
    return f"<td{key}>{inline(text.strip())}</td>"


def line(cells: Iterable[str], attributes: str = "") -> str:
    """A table's row of cells that are HTML."""
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def table(header: Sequence[str], lines: Iterable[str], kind: str = "") -> str:
    """A table that scrolls in a box of its own where the page is too narrow. Numbers are on the
    right, except in the first column; `kind` "words": all to the left."""
    names = "".join(f'<th scope="col">{inline(name)}</th>' for name in header)
    body = "\n".join(lines)
    attributes = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{attributes}><thead><tr>{names}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def to_html(text: str, heading: int = 1) -> str:
    """A page of Markdown as HTML; its highest headings are h`heading`."""
    blocks: list[str] = []
    for kind, group in groupby(map(str.strip, text.splitlines()), _kind):
        lines = list(group)
        if kind == "heading":
            for each in lines:
                marks, _, title = each.partition(" ")
                level = min(6, heading + len(marks) - 1)
                blocks.append(f"<h{level}>{inline(title.strip())}</h{level}>")
        elif kind == "list":
            items = "".join(f"<li>{inline(each[2:])}</li>" for each in lines)
            blocks.append(f"<ul>{items}</ul>")
        elif kind == "table" and len(lines) > 1 and _RULE.fullmatch(lines[1]):
            blocks.append(_table(lines))
        elif kind:
            blocks.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _kind(line: str) -> str:
    """The kind of block of a line; nothing between two blocks."""
    if not line:
        return ""
    if _HEADING.fullmatch(line):
        return "heading"
    if line.startswith("- "):
        return "list"
    return "table" if line.startswith("|") else "paragraph"


def _table(lines: Sequence[str]) -> str:
    header, rule, *body = [_split(each) for each in lines]
    rows = [_fitted(each, len(header)) for each in body]
    words = not any(each.endswith(":") for each in rule)
    return table(header, [line(map(cell, each)) for each in rows], "words" if words else "")


def _split(text: str) -> list[str]:
    return [each.strip() for each in _CELLS.split(text.strip().removeprefix("|"))[:-1]]


def _fitted(cells: list[str], width: int) -> list[str]:
    """As many cells as the header has: a bar that was not escaped stays in the last one."""
    if len(cells) > width:
        return [*cells[: width - 1], " | ".join(cells[width - 1 :])]
    return cells + [""] * (width - len(cells))
