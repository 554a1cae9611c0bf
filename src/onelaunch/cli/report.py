"""`onelaunch report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onelaunch.cli.common import Debug, Quiet, log

HTML = Path("report.html")


def report(
    records: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RECORD...",
            help="Records, or folders of them; default: benchmarks/records.",
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
            help=f"One page of HTML; default without --markdown: {HTML}.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="The same in Markdown, without plots."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare records with the figures of two published studies."""
    from onelaunch.bench.core.record import DEFAULT_FOLDER
    from onelaunch.bench.report.gather import gather
    from onelaunch.checkpoints.atomic import write_text

    gathered = gather(records or [DEFAULT_FOLDER], again=again or [])
    for part in (*gathered.parts, *gathered.again):
        for problem in part.problems:
            log(f"{part.where}: {problem}", quiet)
    if markdown:
        from onelaunch.bench.report.markdown import document

        write_text(markdown, document(gathered, markdown.parent))
        print(markdown)
    if out or not markdown:
        from onelaunch.bench.report.html import page
        from onelaunch.bench.report.svg import plots_of, story_plots

        plots, failed, without = plots_of(gathered.parts)
        if without:
            log(without, quiet)
        write_text(out or HTML, page(gathered, plots, failed, without, story_plots(gathered)))
        print(out or HTML)
