"""A report as Markdown, to be kept beside the records: tables and plots are linked, not copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from onelaunch.bench.core.tables import markdown
from onelaunch.bench.report.again import (
    AGAIN_HEADER,
    AGAIN_TITLE,
    DIFFERING_HEADER,
    again_lines,
    again_summary,
    differing_lines,
    repeated,
)
from onelaunch.bench.report.gather import (
    FINDING_HEADER,
    PUBLISHED_HEADER,
    READING,
    ROW_HEADER,
    STUDIES,
    TITLE,
    Part,
    Report,
    counted,
    described,
    figures,
    finding_lines,
    row_lines,
    summary,
    summary_lines,
)
from onelaunch.bench.report.story import CLAIMS, STORY_TITLE, introduction, told

MADE = "Made of the records by `make results`; to be made again, not to be edited."


def document(report: Report, folder: Path) -> str:
    """The whole text, with links from a file in `folder`."""
    header, lines = summary_lines(report)
    parts = [
        f"# {TITLE}",
        MADE,
        *_story(report),
        "## Everything that was measured",
        *summary(report),
        _table(header, lines),
        *READING,
        *(_experiment(name, of_it, folder) for name, of_it in report.experiments.items()),
        *_again(report),
        _published(report),
    ]
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def _story(report: Report) -> Iterator[str]:
    """What the studies claimed, and of each claim what holds on which device."""
    sentences = introduction(report)
    if not sentences:
        return
    yield f"## {STORY_TITLE}"
    yield from map(_words, sentences)
    for study, name in STUDIES.items():
        yield f"### {name}"
        for claim in CLAIMS:
            if claim.study == study and (lines := list(told(report, claim))):
                yield claim.text
                yield "\n".join(
                    f"- {_words(each.device)}: **{each.words}**"
                    f"{f' ({each.share})' if each.share else ''}: {_words(each.figures)}"
                    for each in lines
                )


def _experiment(name: str, parts: Sequence[Part], folder: Path) -> str:
    found = [f"## {_words(name)}"]
    if sentence := described(name):
        found.append(sentence)
    if lines := finding_lines(parts):
        found.append(_table(FINDING_HEADER, [cells for _, cells in lines], len(FINDING_HEADER)))
    for part in parts:
        found.append(f"{_links(part, folder)}: {part.origin or _words(part.device)}")
        found += [f"- {_words(problem)}" for problem in part.problems]
        if not part.table:
            found.append(_table(ROW_HEADER, row_lines(part.record)))
    return "\n\n".join(found)


def _links(part: Part, folder: Path) -> str:
    """The record, and what lies beside it."""
    beside = [("record", part.path)]
    beside += [
        (name, path)
        for name, path in (
            ("table", part.path.with_suffix(".md")), ("plot", part.path.with_suffix(".png"))
        )
        if path.is_file()
    ]  # fmt: skip
    return ", ".join(
        f"[{name}]({quote(Path(os.path.relpath(path, folder)).as_posix())})"
        for name, path in beside
    )


def _again(report: Report) -> list[str]:
    found = repeated(report)
    if not found:
        return []
    parts = [f"## {AGAIN_TITLE}", again_summary(found)]
    parts.append(_table(AGAIN_HEADER, [cells for _, cells in again_lines(found)], 2))
    if other := [cells for _, cells in differing_lines(found)]:
        parts.append(_table(DIFFERING_HEADER, other, len(DIFFERING_HEADER)))
    return parts


def _published(report: Report) -> str:
    found = ["## Every published row"]
    for study, name in STUDIES.items():
        lines = [
            [
                f"{row.table}: {row.row}",
                figures(row) or "-",
                row.answer or "-",
                _answer(report, key),
            ]
            for key, row in report.published.items()
            if row.study == study
        ]
        found += [f"### {name}", _table(PUBLISHED_HEADER, lines, len(PUBLISHED_HEADER))]
    return "\n\n".join(found)


def _answer(report: Report, key: str) -> str:
    answers = report.answers(key)
    if not answers:
        return report.unanswered(key)
    return "; ".join(f"{device}: {counted(counts)}" for device, counts in answers.items())


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Every cell in its column, whatever a record has in it."""
    return markdown(header, [[_words(each) for each in cells] for cells in lines], left)


def _words(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("\\|", "|").replace("|", "\\|")
