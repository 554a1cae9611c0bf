"""A report as Markdown, to be kept beside the records: tables and plots are linked, not copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from onelaunch.bench.core.tables import markdown
from onelaunch.bench.report import again, gather, story
from onelaunch.bench.report.gather import Part, Report

MADE = "Made of the records by `make results`; to be made again, not to be edited."


def document(report: Report, folder: Path) -> str:
    """The whole text, with links from a file in `folder`."""
    header, lines = gather.summary_lines(report)
    parts = [
        f"# {gather.TITLE}",
        MADE,
        *_story(report),
        "## Everything that was measured",
        *gather.summary(report),
        _table(header, lines),
        *gather.READING,
        *(_experiment(name, of_it, folder) for name, of_it in report.experiments.items()),
        *_again(report),
        _published(report),
    ]
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def _story(report: Report) -> Iterator[str]:
    """What the studies claimed, and of each claim what holds on which device."""
    sentences = story.introduction(report)
    if not sentences:
        return
    yield f"## {story.STORY_TITLE}"
    yield from map(_words, sentences)
    for study, name in gather.STUDIES.items():
        yield f"### {name}"
        for claim in story.CLAIMS:
            if claim.study == study and (lines := list(story.told(report, claim))):
                yield claim.text
                yield "\n".join(
                    f"- {_words(each.device)}: **{each.words}**"
                    f"{f' ({each.share})' if each.share else ''}: {_words(each.figures)}"
                    for each in lines
                )


def _experiment(name: str, parts: Sequence[Part], folder: Path) -> str:
    found = [f"## {_words(name)}"]
    if sentence := gather.described(name):
        found.append(sentence)
    if lines := gather.finding_lines(parts):
        found.append(
            _table(gather.FINDING_HEADER, [cells for _, cells in lines], len(gather.FINDING_HEADER))
        )
    for part in parts:
        found.append(f"{_links(part, folder)}: {part.origin or _words(part.device)}")
        found += [f"- {_words(problem)}" for problem in part.problems]
        if not part.table:
            found.append(_table(gather.ROW_HEADER, gather.row_lines(part.record)))
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
    found = again.repeated(report)
    if not found:
        return []
    parts = [f"## {again.AGAIN_TITLE}", again.again_summary(found)]
    parts.append(_table(again.AGAIN_HEADER, [cells for _, cells in again.again_lines(found)], 2))
    if other := [cells for _, cells in again.differing_lines(found)]:
        parts.append(_table(again.DIFFERING_HEADER, other, len(again.DIFFERING_HEADER)))
    return parts


def _published(report: Report) -> str:
    found = ["## Every published row"]
    for study, name in gather.STUDIES.items():
        lines = [
            [
                f"{row.table}: {row.row}",
                gather.figures(row) or "-",
                row.answer or "-",
                _answer(report, key),
            ]
            for key, row in report.published.items()
            if row.study == study
        ]
        found += [
            f"### {name}",
            _table(gather.PUBLISHED_HEADER, lines, len(gather.PUBLISHED_HEADER)),
        ]
    return "\n\n".join(found)


def _answer(report: Report, key: str) -> str:
    answers = report.answers(key)
    if not answers:
        return report.unanswered(key)
    return "; ".join(f"{device}: {gather.counted(counts)}" for device, counts in answers.items())


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Every cell in its column, whatever a record has in it."""
    return markdown(header, [[_words(each) for each in cells] for cells in lines], left)


def _words(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("\\|", "|").replace("|", "\\|")
