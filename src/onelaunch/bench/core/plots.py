"""Pictures of records: the bars, lines and heat maps that experiments draw, and their file."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onelaunch.checkpoints.atomic import atomic_file
from onelaunch.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

COLORS = ("#1f5a8f", "#d08020", "#1a7a36", "#b03060", "#6a51a3", "#1b8a8f", "#a0522d", "#777777")
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


Values = Mapping[str, float]
"""By group of bars; a group without one has no bar."""


def label(
    axes: Axes, x: str, y: str, title: str = "", log: str = "", grid: str = "both", size: float = 8
) -> None:
    """Names of the axes, which of them (`log`: "x", "y", "xy") are logarithmic, grid, legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if title:
        axes.set_title(title, fontsize=10)
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=size)


def panels(
    count: int, width: float = 5.0, height: float = 4.0, title: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes next to each other, each `width` inches wide."""
    figure = new_figure(width * count, height)
    figure.suptitle(title, fontsize=10)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def bars(
    title: str,
    series: Mapping[str, Values],
    x: str,
    y: str,
    across: bool = False,
    log: str = "",
    names: Mapping[str, str] | None = None,
    colors: Sequence[str] = COLORS,
    at: float | None = None,
) -> Figure | None:
    """A bar for each value of each series, in groups; `across`: horizontal, the groups one under
    the other. `names` of the groups where they are not their keys; a line at `at`. None without a
    value."""
    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    if not groups:
        return None
    figure = new_figure(7.5, 1.4 + 0.4 * len(groups)) if across else new_figure(9, 4)
    axes = figure.subplots()
    thick = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [groups.index(group) + (number + 0.5) * thick - 0.4 for group in values]
        draw = axes.barh if across else axes.bar
        color = colors[number % len(colors)]
        draw(places, list(values.values()), 0.95 * thick, label=name, color=color)
    ticks = [(names or {}).get(group, group) for group in groups]
    if across:
        axes.set_yticks(range(len(groups)), ticks, fontsize=8)
        axes.invert_yaxis()
    else:
        axes.set_xticks(range(len(groups)), ticks, fontsize=8)
    if at is not None:
        (axes.axvline if across else axes.axhline)(at, color="black", linewidth=0.8)
    label(axes, x, y, title, log, "x" if across else "y")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def heat_map(
    axes: Axes,
    speeds: Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str,
) -> Any:
    """Speeds relative to something as figures and colours, green above 1 and red below, to
    SHADES_TO either way; None is blank. Returns the image, for a colour bar."""
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
    for i, row in enumerate(speeds):
        for j, speed in enumerate(row):
            if speed is not None:
                color = "white" if abs(shades[i][j]) > 0.8 * ends else "black"
                axes.text(j, i, f"{speed:.2f}", ha="center", va="center", fontsize=7, color=color)
    return image


def color_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    """The scale of `heat_map`'s colours."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["1/2 or less", "0.71", "1", "1.41", "2 or more"])
    bar.set_label(label, fontsize=8)
