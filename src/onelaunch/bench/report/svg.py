"""Plots of a report as SVG that can be in one page, the same for the same record."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelaunch.bench.report import story
from onelaunch.bench.report.gather import Part, Report, module_of
from onelaunch.compilation.background import in_a_line
from onelaunch.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROLOG = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_COMMENT = re.compile(r"\s*<!--.*?-->", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_ID = re.compile(r' id="([^"]+)"')
_REFERENCE = re.compile(r"#([A-Za-z_][\w.-]*)")
_BETWEEN = re.compile(r">\s*\n\s*<")


def plots_of(parts: Sequence[Part]) -> tuple[Mapping[Path, str], Mapping[Path, str], str]:
    """SVG by record; why there is none, by record; and why there are none at all, where matplotlib
    is missing."""
    drawn: dict[Path, str] = {}
    failed: dict[Path, str] = {}
    for part in parts:
        draw = getattr(module_of(part.experiment, []), "draw", None)
        if draw is None:
            continue
        try:
            figure = draw(part.record)
            if figure is not None:
                drawn[part.path] = svg(figure, part.where)
        except MissingExtra as error:
            return {}, {}, f"without plots: {in_a_line(error)}"
        except Exception as error:
            failed[part.path] = f"without a plot: {in_a_line(error)}"
    return drawn, failed, ""


def story_plots(report: Report) -> dict[str, str]:
    """The story's plots as SVG, by title, those that its records have; none without matplotlib,
    which `plots_of` says."""
    try:
        figures = {plot.title: story.draw(report, plot) for plot in story.PLOTS}
    except MissingExtra:
        return {}
    return {title: svg(figure, title) for title, figure in figures.items() if figure is not None}


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element. Its text stays text, and no id is another plot's: the parts of
    one that is hidden would be missing in those that share them."""
    import matplotlib

    # otherwise every text names all fonts that may replace the first
    fonts = ["DejaVu Sans", "sans-serif"]
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": fonts}
    ):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = _METADATA.sub("", _COMMENT.sub("", _PROLOG.sub("", file.getvalue())))
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(lambda match: match[0] if match[1] in used else "", text)
    return _BETWEEN.sub("><", text).strip()
