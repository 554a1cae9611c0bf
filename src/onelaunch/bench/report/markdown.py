"""A report as Markdown, to be kept with the records: tables and plots are linked, not copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from onelaunch.bench.core.tables import markdown
from onelaunch.bench.report import contents, story
from onelaunch.bench.report.contents import Cell, Table
from onelaunch.bench.report.gather import Part, Report

MADE = "Made of the records by `make results`; to be made again, not to be edited."


def document(report: Report, folder: Path) -> str:
    """The whole text, with links from a file in `folder`."""
    parts = [f"# {contents.TITLE}", MADE, *_story(report), "## Everything that was measured"]
    parts += [contents.summary(report), _table(contents.summary_table(report)), *contents.READING]
    for name, of_it in report.experiments.items():
        parts += _experiment(name, of_it, folder)
    sentence, tables = contents.again(report)
    if tables:
        parts += [f"## {contents.AGAIN_TITLE}", sentence, *map(_table, tables)]
    parts.append("## Every published row")
    for study, table in contents.published_tables(report):
        parts += [f"### {study}", _table(table)]
    text = "\n\n".join(parts) + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")


def _story(report: Report) -> Iterator[str]:
    """The studies' claims, and on which device each holds."""
    sentences = story.introduction(report)
    if not sentences:
        return
    yield f"## {story.STORY_TITLE}"
    yield from map(_words, sentences)
    for study, name in contents.STUDIES.items():
        yield f"### {name}"
        for claim, answers in story.answers(report, study):
            yield claim
            yield "\n".join(
                f"- {_words(each.device)}: **{each.words}**"
                f"{f' ({each.share})' if each.share else ''}: {_words(each.figures)}"
                for each in answers
            )


def _experiment(name: str, parts: Sequence[Part], folder: Path) -> Iterator[str]:
    yield f"## {_words(name)}"
    if sentence := contents.described(name):
        yield sentence
    if findings := contents.findings_table(parts):
        yield _table(findings)
    for part in parts:
        yield f"{_links(part, folder)}: {part.origin or _words(part.device)}"
        yield from (f"- {_words(problem)}" for problem in part.problems)
        if not part.table:
            yield _table(contents.rows_table(part.record))


def _links(part: Part, folder: Path) -> str:
    """The record, and its table and plot where they are next to it."""
    paths = {"record": part.path}
    for name, suffix in (("table", ".md"), ("plot", ".png")):
        if (path := part.path.with_suffix(suffix)).is_file():
            paths[name] = path
    return ", ".join(
        f"[{name}]({quote(Path(os.path.relpath(path, folder)).as_posix())})"
        for name, path in paths.items()
    )


def _table(table: Table) -> str:
    """Every cell in its column, whatever a record has in it."""
    return markdown(
        table.header, [list(map(_cell, each.cells)) for each in table.lines], table.left
    )


def _cell(cell: Cell) -> str:
    if not isinstance(cell, str):
        cell = "; ".join(f"{device}: {text}" for device, text in cell.items())
    return _words(cell)


def _words(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("\\|", "|").replace("|", "\\|")
