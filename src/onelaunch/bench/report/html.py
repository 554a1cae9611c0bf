"""A report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from onelaunch.bench.core.record import slug
from onelaunch.bench.report import again, gather, story
from onelaunch.bench.report.convert import cell, escape, inline, line, table, to_html
from onelaunch.bench.report.gather import Part, Report

# What a browser is story.told: nothing from elsewhere, whatever a record holds.
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
    parts = [
        _HEAD.format(policy=_POLICY, title=escape(gather.TITLE), style=_file("report.css")),
        f"<h1>{escape(gather.TITLE)}</h1>",
        *_story(report, story_plots or {}),
        *([f'<p class="problem">{escape(without)}</p>'] if without else []),
        "<h2>Everything that was measured</h2>",
        _summary(report),
        _contents(report),
        "<main>",
        *(
            _experiment(name, of_it, plots or {}, failed or {})
            for name, of_it in report.experiments.items()
        ),
        *_again(report),
        _published(report),
        _records(report.parts),
        "</main>",
        f"<script>\n{_file('report.js')}</script>",
        "</body></html>\n",
    ]
    # a lone surrogate, which JSON can have, is no UTF-8
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _file(name: str) -> str:
    return (resources.files("onelaunch.bench.report") / name).read_text(encoding="utf-8")


def _story(report: Report, plots: Mapping[str, str]) -> Iterator[str]:
    """What the studies claimed, and of each claim what holds on which device."""
    sentences = story.introduction(report)
    if not sentences:
        return
    yield f'<section id="story"><h2>{escape(story.STORY_TITLE)}</h2>'
    yield from (f"<p>{escape(sentence)}</p>" for sentence in sentences)
    for title, plot in plots.items():
        yield f'<div class="plot" role="img" aria-label="{escape(title)}">{plot}</div>'
    for study, name in gather.STUDIES.items():
        yield f"<h3>{escape(name)}</h3>"
        for claim in story.CLAIMS:
            if claim.study == study and (lines := list(story.told(report, claim))):
                items = "".join(
                    f"<li{_of([each.device])}>{escape(each.device)}: "
                    f"{_badge(each.verdict, each.words)} "
                    f'<span class="figures">{escape(each.share)}</span> {escape(each.figures)}</li>'
                    for each in lines
                )
                yield f'<div class="claim"><p>{escape(claim.text)}</p><ul>{items}</ul></div>'
    yield "</section>"


def _summary(report: Report) -> str:
    header, lines = gather.summary_lines(report)
    body = [
        line(map(cell, each), _of([device]))
        for device, each in zip(report.devices, lines, strict=True)
    ]
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{slug(device)}"> {escape(device)}</label>'
        for device in report.devices
    )
    return "\n".join(
        [
            *(f"<p>{inline(text)}</p>" for text in gather.summary(report)),
            table(header, body),
            *(f"<p>{inline(text)}</p>" for text in gather.READING),
            f'<fieldset id="devices" hidden><legend>Devices</legend>{boxes}</fieldset>',
        ]
    )


def _contents(report: Report) -> str:
    items = [
        f'<li{_of(part.device for part in parts)}><a href="#{slug(name)}">{escape(name)}</a></li>'
        for name, parts in report.experiments.items()
    ]
    if again.repeated(report):
        items.append(f'<li><a href="#again">{escape(again.AGAIN_TITLE)}</a></li>')
    items += [
        '<li><a href="#published">every published row</a></li>',
        '<li><a href="#records">records</a></li>',
    ]
    return f"<nav><ul>{''.join(items)}</ul></nav>"


def _experiment(
    name: str, parts: Sequence[Part], plots: Mapping[Path, str], failed: Mapping[Path, str]
) -> str:
    found = [f"<h2>{escape(name)}</h2>"]
    if sentence := gather.described(name):
        found.append(f"<p>{escape(sentence)}</p>")
    lines = gather.finding_lines(parts)
    found.append(f"<details><summary>{_folded(len(lines), len(parts))}</summary>")
    if lines:
        body = [line(_finding(cells), _of([device])) for device, cells in lines]
        found.append(table(gather.FINDING_HEADER, body, "words findings"))
    for part in parts:
        problems = [*part.problems, *([failed[part.path]] if part.path in failed else [])]
        found += [
            f"<div{_of([part.device])}>",
            _view(part, plots),
            *(f'<p class="problem">{escape(each)}</p>' for each in problems),
            _rows(part),
            "</div>",
        ]
    found.append("</details>")
    devices = _of(part.device for part in parts)
    return f'<section id="{slug(name)}"{devices}>' + "\n".join(filter(None, found)) + "</section>"


def _folded(statements: int, records: int) -> str:
    """What a section's fold holds."""
    counts = [(statements, "statement"), (records, "record")]
    return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)


def _finding(cells: Sequence[str]) -> list[str]:
    """The cells of a finding: its verdict, the last but one, in its colour."""
    badge = f'<td class="verdict">{_badge(cells[-2])}</td>'
    return [*map(cell, cells[:-2]), badge, cell(cells[-1])]


def _badge(verdict: str, words: str = "") -> str:
    kind = verdict if verdict in ("confirmed", "refuted") else "none"
    return f'<span class="{kind}">{escape(words or verdict)}</span>'


def _view(part: Part, plots: Mapping[Path, str]) -> str:
    """A record's table, under its device: where it comes from, its plot, its gather.figures."""
    origin = f'<div class="origin">{to_html(part.origin)}</div>'
    if not part.table:
        head = f"<h3>{escape(part.experiment)} on {escape(part.device)}</h3>"
        return "\n".join([head, origin, _plot(part, plots)])
    title, found, after = part.table.partition(part.origin) if part.origin else ("", "", "")
    if not found:  # the table does not say it
        title, _, after = part.table.partition("\n\n")
    return "\n".join([to_html(title, 3), origin, _plot(part, plots), to_html(after, 3)])


def _plot(part: Part, plots: Mapping[Path, str]) -> str:
    if part.path not in plots:
        return ""
    label = escape(f"Plot of {part.experiment} on {part.device}")
    return f'<div class="plot" role="img" aria-label="{label}">{plots[part.path]}</div>'


def _rows(part: Part) -> str:
    """Every row with its spread; shut where a table says it better."""
    rows = table(
        gather.ROW_HEADER, [line(map(cell, cells)) for cells in gather.row_lines(part.record)]
    )
    shut = "" if part.table else " open"
    return f"<details{shut}><summary>Every row, with its spread</summary>{rows}</details>"


def _again(report: Report) -> list[str]:
    found = again.repeated(report)
    if not found:
        return []
    parts = [
        f"<p>{inline(again.again_summary(found))}</p>",
        f"<details><summary>{len(found)} experiments</summary>",
    ]
    for header, lines in (
        (again.AGAIN_HEADER, again.again_lines(found)),
        (again.DIFFERING_HEADER, list(again.differing_lines(found))),
    ):
        if lines:
            body = [line(map(cell, cells), _of([device])) for device, cells in lines]
            parts.append(table(header, body, "words"))
    head = f'<section id="again"><h2>{escape(again.AGAIN_TITLE)}</h2>'
    return [head, *parts, "</details></section>"]


def _published(report: Report) -> str:
    found = ['<section id="published"><h2>Every published row</h2>']
    for study, name in gather.STUDIES.items():
        body = [
            line(
                [
                    cell(f"{row.table}: {row.row}"),
                    cell(gather.figures(row) or "-"),
                    _answering(report, row.answer),
                    f"<td>{_verdicts(report, key)}</td>",
                ]
            )
            for key, row in report.published.items()
            if row.study == study
        ]
        fold = f"<details><summary>{escape(name)}: {len(body)} rows</summary>"
        found += [fold, table(gather.PUBLISHED_HEADER, body, "words"), "</details>"]
    return "\n".join([*found, "</section>"])


def _answering(report: Report, experiment: str) -> str:
    if experiment in report.experiments:
        return f'<td><a href="#{slug(experiment)}">{escape(experiment)}</a></td>'
    return cell(experiment or "-")


def _verdicts(report: Report, key: str) -> str:
    answers = report.answers(key)
    if not answers:
        return inline(report.unanswered(key))
    return "".join(
        f"<div{_of([device])}>{escape(device)}: {_badge(gather.counted(counts))}</div>"
        for device, counts in answers.items()
    )


def _records(parts: Sequence[Part]) -> str:
    body = [
        line(
            map(
                cell,
                [
                    part.experiment,
                    part.device,
                    str(part.record.get("date", "-")),
                    f"{part.record.get('commit', '-')}",
                    ", ".join(f"{k} {v}" for k, v in part.record.get("versions", {}).items()),
                    part.where,
                ],
            ),
            _of([part.device]),
        )
        for part in parts
    ]
    header = ("experiment", "device", "date", "commit", "versions", "file")
    fold = f"<details><summary>{len(parts)} files</summary>"
    listed = table(header, body, "words")
    return f'<section id="records"><h2>Records</h2>{fold}{listed}</details></section>'


def _of(devices: Iterable[str]) -> str:
    """The attribute by which an element is shown and hidden with its devices."""
    return f' data-device="{" ".join(sorted({slug(device) for device in devices}))}"'
