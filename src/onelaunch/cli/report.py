"""`onelaunch report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onelaunch.cli.common import Debug, Quiet, say

HTML = Path("report.html")


def report(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RECORD...",
            help="Records, or folders of them; if not given benchmarks/records.",
        ),
    ] = None,
    again: Annotated[
        list[Path] | None,
        typer.Option(
            "--again",
            metavar="FOLDER",
            help="Records of a second run: whether their verdicts are the same. May be given "
            "several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help=f"One page of HTML; {HTML} if neither it nor --markdown is given.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="The same in Markdown, without plots."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What records say, beside the figures of two published studies."""
    from onelaunch.bench.core.record import DEFAULT_FOLDER
    from onelaunch.bench.report.gather import gather
    from onelaunch.checkpoints.atomic import write_text

    found = gather(records or [DEFAULT_FOLDER], again=again or [])
    for part in (*found.parts, *found.again):
        for problem in part.problems:
            say(f"{part.where}: {problem}", quiet)
    if markdown:
        from onelaunch.bench.report.markdown import document

        write_text(markdown, document(found, markdown.parent))
        print(markdown)
    if out or not markdown:
        from onelaunch.bench.report.html import page
        from onelaunch.bench.report.svg import plots_of, story_plots

        plots, failed, without = plots_of(found.parts)
        if without:
            say(without, quiet)
        write_text(out or HTML, page(found, plots, failed, without, story_plots(found)))
        print(out or HTML)
