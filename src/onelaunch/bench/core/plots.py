"""Pictures of records: what several experiments draw, and the file they go to."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelaunch.checkpoints.atomic import atomic_file
from onelaunch.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = "RdYlGn"
SHADES_TO = 2.0  # times as fast, or as slow, as what has the middle colour


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches. Raises MissingExtra where matplotlib is not installed."""
    # where it keeps its fonts is its own affair, unless it fails
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "bench", "the plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def heat_map(
    axes: Axes,
    speeds: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
) -> Any:
    """Speeds relative to something as colours, green above 1 and red below, to SHADES_TO either
    way; None is blank. `texts` stand in the cells. Returns the image, for a colour bar."""
    ends = math.log2(SHADES_TO)
    shades = [
        [math.nan if s is None else max(-ends, min(ends, math.log2(s))) for s in row]
        for row in speeds
    ]
    image = axes.imshow(shades, aspect="auto", cmap=SHADES, vmin=-ends, vmax=ends)
    axes.set_xticks(range(len(column_names)), column_names, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(row_names)), row_names, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            dark = abs(shades[i][j]) > 0.8 * ends
            color = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return image


def color_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """The scale of `heat_map`'s colours."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["1/2 or less", "0.71", "1", "1.41", "2 or more"])
    bar.set_label(label, fontsize=8)
