"""Our own Markdown as HTML: headings, paragraphs, lists, tables; bold, code, links. Everything else
is text, and text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]+`)")
_LINK = re.compile(r"\[([^\]]+)\]\(([^()\s]+)\)")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HEADING = re.compile(r"(#{1,6}) +(.*)")
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
    """Text that can stand in HTML, in an attribute too."""
    return html.escape(text, quote=True)


def inline(text: str) -> str:
    """A line of Markdown as HTML."""
    return "".join(
        f"<code>{escape(piece[1:-1])}</code>" if _CODE.fullmatch(piece) else _marked(escape(piece))
        for piece in _CODE.split(text)
    )


def _marked(escaped: str) -> str:
    return _BOLD.sub(r"<strong>\1</strong>", _LINK.sub(_link, escaped)).replace("\\|", "|")


def _link(found: re.Match[str]) -> str:
    """Only to the web or beside the page: a record's text must not become a script."""
    text, address = found.groups()
    if _SCHEME.match(address) and not address.startswith(("https://", "http://")):
        return found[0]
    return f'<a href="{address}">{text}</a>'


def number_of(text: str) -> float | None:
    """The number that a cell is sorted by, its first: of '1,234', '12.3%', '3.4x', '0.1 to 0.2'.
    None where it begins with none, as names, dates and shapes (4096x64) do."""
    plain = re.sub(r"[*`]", "", text).strip()
    found = _NUMBER.match(plain)
    return None if found is None or _DATE.match(plain) else float(found[1].replace(",", ""))


def cell(text: str) -> str:
    """A cell of a table, with the number that it is sorted by where the text is not just that."""
    number = number_of(text)
    key = (
        ""
        if number is None or _PLAIN_NUMBER.fullmatch(text.strip())
        else f' data-n="{number:.15g}"'
    )
    return f"<td{key}>{inline(text.strip())}</td>"


def line(cells: Iterable[str], attributes: str = "") -> str:
    """A row of a table, from cells that are HTML."""
    return f"<tr{attributes}>{''.join(cells)}</tr>"


def table(header: Sequence[str], lines: Iterable[str], kind: str = "") -> str:
    """A table that scrolls in a box of its own where the page is too narrow. Numbers stand to the
    right, but in the first column; `kind` "words": all to the left."""
    names = "".join(f'<th scope="col">{inline(name)}</th>' for name in header)
    body = "\n".join(lines)
    attributes = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{attributes}><thead><tr>{names}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def to_html(text: str, heading: int = 1) -> str:
    """A page of Markdown as HTML; its highest headings are h`heading`."""
    found: list[str] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        first = lines[at].strip()
        if not first:
            at += 1
        elif heads := _HEADING.fullmatch(first):
            level = min(6, heading + len(heads[1]) - 1)
            found.append(f"<h{level}>{inline(heads[2])}</h{level}>")
            at += 1
        elif _begins_table(lines, at):
            end = _end(lines, at, "|")
            found.append(_table(lines[at:end]))
            at = end
        elif first.startswith("- "):
            end = _end(lines, at, "- ")
            items = "".join(f"<li>{inline(each.strip()[2:])}</li>" for each in lines[at:end])
            found.append(f"<ul>{items}</ul>")
            at = end
        else:
            end = at + 1
            while end < len(lines) and not _begins_block(lines, end):
                end += 1
            found.append(f"<p>{inline(' '.join(each.strip() for each in lines[at:end]))}</p>")
            at = end
    return "\n".join(found)


def _begins_table(lines: Sequence[str], at: int) -> bool:
    return (
        lines[at].lstrip().startswith("|")
        and at + 1 < len(lines)
        and _RULE.fullmatch(lines[at + 1].strip()) is not None
    )


def _begins_block(lines: Sequence[str], at: int) -> bool:
    first = lines[at].strip()
    return (
        not first
        or first.startswith("- ")
        or _HEADING.fullmatch(first) is not None
        or _begins_table(lines, at)
    )


def _end(lines: Sequence[str], at: int, mark: str) -> int:
    """Where the lines that begin with `mark` end."""
    while at < len(lines) and lines[at].lstrip().startswith(mark):
        at += 1
    return at


def _table(lines: Sequence[str]) -> str:
    header, rule, *body = [_split(each) for each in lines]
    rows = [_fitted(each, len(header)) for each in body]
    words = not any(each.endswith(":") for each in rule)
    return table(header, [line(map(cell, each)) for each in rows], "words" if words else "")


def _split(text: str) -> list[str]:
    return [each.strip() for each in _CELLS.split(text.strip().removeprefix("|"))[:-1]]


def _fitted(cells: list[str], width: int) -> list[str]:
    """As many cells as the header has: a bar that nobody escaped stays in the last one."""
    if len(cells) > width:
        return [*cells[: width - 1], " | ".join(cells[width - 1 :])]
    return cells + [""] * (width - len(cells))
