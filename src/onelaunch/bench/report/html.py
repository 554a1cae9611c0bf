"""A report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from onelaunch.bench.core.findings import ANSWERS
from onelaunch.bench.core.record import slug
from onelaunch.bench.report import contents, convert, story
from onelaunch.bench.report.contents import Cell, Table
from onelaunch.bench.report.convert import escape, inline, to_html
from onelaunch.bench.report.gather import Part, Report

# What a browser may load: nothing from elsewhere, whatever a record holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style></head>
<body>
"""


def page(
    report: Report,
    plots: Mapping[Path, str] | None = None,
    failed: Mapping[Path, str] | None = None,
    without: str = "",
    story_plots: Mapping[str, str] | None = None,
) -> str:
    """The whole page: the story with its plots, then everything, folded. `plots` are SVG elements
    by record, `failed` why a record has none, `without` why there are none at all."""
    again, tables = contents.again(report)
    parts = [
        _HEAD.format(policy=_POLICY, title=escape(contents.TITLE), style=_file("report.css")),
        f"<h1>{escape(contents.TITLE)}</h1>",
        *_story(report, story_plots or {}),
        _problem(without),
        "<h2>Everything that was measured</h2>",
        f"<p>{inline(contents.summary(report))}</p>",
        _table(report, contents.summary_table(report)),
        *(f"<p>{inline(text)}</p>" for text in contents.READING),
        _devices(report.devices),
        _navigation(report, bool(tables)),
        "<main>",
    ]
    for name, of_it in report.experiments.items():
        parts += _experiment(report, name, of_it, plots or {}, failed or {})
    if tables:
        folded = _fold(
            _count(len(tables[0].lines), "experiment"), *(_table(report, each) for each in tables)
        )
        parts.append(_section("again", contents.AGAIN_TITLE, f"<p>{inline(again)}</p>", folded))
    studies = contents.published_tables(report)
    parts += [
        _section(
            "published",
            "Every published row",
            *(_fold(f"{name}: {len(t.lines)} rows", _table(report, t)) for name, t in studies),
        ),
        _section(
            "records",
            "Records",
            _fold(f"{len(report.parts)} files", _table(report, contents.records_table(report))),
        ),
        "</main>",
        f"<script>\n{_file('report.js')}</script>",
        "</body></html>\n",
    ]
    # a lone surrogate, which JSON can have, is no UTF-8
    return "\n".join(filter(None, parts)).encode("utf-8", "replace").decode("utf-8")


def _file(name: str) -> str:
    return (resources.files("onelaunch.bench.report") / name).read_text(encoding="utf-8")


def _story(report: Report, plots: Mapping[str, str]) -> Iterator[str]:
    """The studies' claims, and on which device each holds."""
    sentences = story.introduction(report)
    if not sentences:
        return
    yield f'<section id="story"><h2>{escape(story.STORY_TITLE)}</h2>'
    yield from (f"<p>{escape(sentence)}</p>" for sentence in sentences)
    yield from (_plot(title, plot, "plot story") for title, plot in plots.items())
    for study, name in contents.STUDIES.items():
        yield f"<h3>{escape(name)}</h3>"
        for claim, answers in story.answers(report, study):
            items = "".join(
                f"<li{_of([each.device])}>{escape(each.device)}: "
                f"{_badge(each.verdict, each.words)} "
                f'<span class="figures">{escape(each.share)}</span> {escape(each.figures)}</li>'
                for each in answers
            )
            yield f'<div class="claim"><p>{escape(claim)}</p><ul>{items}</ul></div>'
    yield "</section>"


def _devices(devices: Sequence[str]) -> str:
    """Boxes by which devices are left out, where there are scripts."""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{slug(device)}"> {escape(device)}</label>'
        for device in devices
    )
    return f'<fieldset id="devices" hidden><legend>Devices</legend>{boxes}</fieldset>'


def _navigation(report: Report, again: bool) -> str:
    links = {name: (slug(name), parts) for name, parts in report.experiments.items()}
    items = [
        f'<li{_of(part.device for part in parts)}><a href="#{name}">{escape(text)}</a></li>'
        for text, (name, parts) in links.items()
    ]
    others = {"again": contents.AGAIN_TITLE} if again else {}
    others |= {"published": "every published row", "records": "records"}
    items += [f'<li><a href="#{name}">{text}</a></li>' for name, text in others.items()]
    return f"<nav><ul>{''.join(items)}</ul></nav>"


def _experiment(
    report: Report,
    name: str,
    parts: Sequence[Part],
    plots: Mapping[Path, str],
    failed: Mapping[Path, str],
) -> Iterator[str]:
    """A section: what the experiment is, and folded its findings and its records."""
    findings = contents.findings_table(parts)
    inside = [_table(report, findings, "words findings")] if findings else []
    for part in parts:
        rows = _table(report, contents.rows_table(part.record))
        inside += [
            f"<div{_of([part.device])}>",
            _view(part, plots.get(part.path, "")),
            *map(_problem, (*part.problems, failed.get(part.path, ""))),
            # shut where a table says it better
            _fold("Every row, with its spread", rows, shut=bool(part.table)),
            "</div>",
        ]
    counts = [_count(len(findings.lines), "statement")] if findings else []
    counts.append(_count(len(parts), "record"))
    sentence = contents.described(name)
    yield _section(
        slug(name),
        name,
        f"<p>{escape(sentence)}</p>" if sentence else "",
        _fold(", ".join(counts), *inside),
        attributes=_of(part.device for part in parts),
    )


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _section(name: str, title: str, *inside: str, attributes: str = "") -> str:
    body = "\n".join(filter(None, (f"<h2>{escape(title)}</h2>", *inside)))
    return f'<section id="{name}"{attributes}>{body}</section>'


def _fold(title: str, *inside: str, shut: bool = True) -> str:
    body = "\n".join(filter(None, inside))
    return f"<details{'' if shut else ' open'}><summary>{escape(title)}</summary>{body}</details>"


def _problem(text: str) -> str:
    return f'<p class="problem">{escape(text)}</p>' if text else ""


def _plot(label: str, plot: str, kind: str = "plot") -> str:
    head = f'<div class="{kind}" role="img" aria-label="{escape(label)}">'
    return f"{head}{plot}</div>" if plot else ""


def _view(part: Part, svg: str) -> str:
    """A record's table, under its device: where it comes from, its plot, its figures."""
    origin = f'<div class="origin">{to_html(part.origin)}</div>'
    plot = _plot(f"Plot of {part.experiment} on {part.device}", svg)
    if not part.table:
        head = f"<h3>{escape(part.experiment)} on {escape(part.device)}</h3>"
        return "\n".join([head, origin, plot])
    title, separator, after = part.table.partition(part.origin or "\n\n")
    if not separator:  # the table does not name its origin
        title, _, after = part.table.partition("\n\n")
    return "\n".join([to_html(title, 3), origin, plot, to_html(after, 3)])


def _table(report: Report, table: Table, kind: str = "") -> str:
    """A verdict in its colour; an experiment as a link to its section."""

    def cell_of(name: str, cell: Cell) -> str:
        if not isinstance(cell, str):
            lines = (
                f"<div{_of([device])}>{escape(device)}: {_badge(text)}</div>"
                for device, text in cell.items()
            )
            return f"<td>{''.join(lines)}</td>"
        if name == "verdict" and cell in contents.VERDICTS:
            return f'<td class="verdict">{_badge(cell)}</td>'
        if name == "experiment" and cell in report.experiments:
            return f'<td><a href="#{slug(cell)}">{escape(cell)}</a></td>'
        return convert.cell(cell)

    lines = [
        convert.line(
            map(cell_of, table.header, each.cells), _of([each.device]) if each.device else ""
        )
        for each in table.lines
    ]
    words = "words" if table.left > 1 else ""
    return convert.table(table.header, lines, kind or words)


def _badge(verdict: str, words: str = "") -> str:
    kind = verdict if verdict in ANSWERS else "none"
    return f'<span class="{kind}">{escape(words or verdict)}</span>'


def _of(devices: Iterable[str]) -> str:
    """The attribute by which an element is shown and hidden with its devices."""
    return f' data-device="{" ".join(sorted({slug(device) for device in devices}))}"'
