"""rms-norm-threshold: from how many rows on a program should hold several of them.

The way the published rule set its constant: for every width the lowest row count from which the
block path beats the row path in every pass, there and at every larger count. On a CPU, which has
neither path, the plain form stands against PyTorch's RMSNorm in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from onelaunch.bench import plots
from onelaunch.bench.norm_cell import PASSES, Cell, host_times, kernel_times
from onelaunch.bench.peers.rms_norm import Contender, Norm, ours, peers, without_kernel
from onelaunch.bench.record import Row
from onelaunch.bench.rms_norm import row_of
from onelaunch.bench.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = "us"

ROWS = tuple(2**n for n in range(8, 17))  # 256 to 65,536
COLUMNS = tuple(2**n for n in range(5, 11))  # 32 to 1,024
QUICK_ROWS, QUICK_COLUMNS = (256, 4096, 65536), (64, 512)
CPU_ROWS, CPU_COLUMNS = (256, 1024, 4096), (32, 128, 512)
CPU_QUICK_ROWS, CPU_QUICK_COLUMNS = (256, 1024), (64, 256)

SAMPLES = 15
CPU_CALLS, CPU_SAMPLES = 20, 5


def run(device: str, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Time every shape and pass; yields a row each, and one a width with its threshold."""
    place = torch.device(device)
    if place.type == "cuda":
        rows = QUICK_ROWS if quick else ROWS
        columns = QUICK_COLUMNS if quick else COLUMNS
    else:
        without_kernel(say)
        rows = CPU_QUICK_ROWS if quick else CPU_ROWS
        columns = CPU_QUICK_COLUMNS if quick else CPU_COLUMNS
    contenders = _contenders(place)
    norms = {contender.name: contender.fresh() for contender in contenders}
    stream = torch.cuda.Stream(place) if place.type == "cuda" else None
    for width in columns:
        ratios: dict[int, dict[str, float]] = {}
        for count in rows:
            with torch.cuda.stream(stream):
                found = list(_shape(count, width, place, contenders, norms, say))
            torch.cuda.empty_cache()  # a graph's memory is its own until this
            ratios[count] = {row.case.split()[1]: row.notes["ratio"] for row in found}
            yield from found
        threshold = lowest_winning(ratios)
        say(f"{width} columns: {_in_words(threshold)}")
        # no row count is 0: it stands for none
        notes = {"unit": "rows", "from": rows[0], "to": rows[-1]}
        yield Row(f"{width} threshold", float(threshold or 0), notes=notes)


def lowest_winning(ratios: Mapping[int, Mapping[str, float]]) -> int | None:
    """The lowest row count from which on ours / other is below 1 in every pass; None where it is
    not even at the largest. `ratios` by row count, then by pass."""
    lowest = None
    for count in sorted(ratios, reverse=True):
        # a pass that could not be timed has not won
        if not all(ratios[count].get(pass_, 1.0) < 1 for pass_ in PASSES):
            break
        lowest = count
    return lowest


def _contenders(device: torch.device) -> list[Contender]:
    """`ours`, the block path (on a CPU the plain form), and what it is held against."""
    forms = {c.name: c for c in ours()}
    if device.type != "cuda":
        plain_torch = next(c for c in peers(device, lambda line: None) if c.name == "torch")
        return [forms["ours"], plain_torch]
    return [
        Contender("ours", forms["block"].fresh, form=True),
        Contender("row", forms["row"].fresh),
    ]


def _shape(
    rows: int,
    columns: int,
    device: torch.device,
    contenders: list[Contender],
    norms: Mapping[str, Norm],
    say: Callable[[str], None],
) -> Iterator[Row]:
    on_gpu = device.type == "cuda"
    cell = Cell(rows, columns, torch.bfloat16 if on_gpu else torch.float32, device)
    words = []
    for pass_ in PASSES:
        if on_gpu:
            times = kernel_times(cell, pass_, contenders, norms, SAMPLES, say)
        else:
            times = host_times(cell, pass_, contenders, norms, CPU_CALLS, CPU_SAMPLES, say)
        if len(times) < len(contenders):
            continue
        row = row_of(f"{cell.shape} {pass_} {'gpu' if on_gpu else 'host'}", times, {"ours"})
        words.append(f"{pass_} {row.notes['ratio']:.2f}")
        yield row
    say(f"{cell.shape}: ours / {contenders[1].name}: {', '.join(words)}")


def table(record: dict[str, Any]) -> str:
    """In Markdown: block time over row time by width and row count, and the thresholds."""
    ratios, thresholds = _ratios(record), _thresholds(record)
    ours_, other = _sides(record)
    widths = sorted({columns for by_shape in ratios.values() for _, columns in by_shape})
    counts = sorted({rows for by_shape in ratios.values() for rows, _ in by_shape})
    parts = [
        f"# RMSNorm, when several rows in a program pay, on {record['device']}",
        f"Lowest row count from which {ours_} takes less time than {other} in every pass:",
        markdown(
            ["columns", "from rows"],
            [[str(width), str(count) if count else "none"] for width, count in thresholds.items()],
        ),
    ]
    for pass_, by_shape in ratios.items():
        lines = [
            [str(count), *(_two_digits(by_shape.get((count, width))) for width in widths)]
            for count in counts
        ]
        parts.append(f"## {pass_}: time of {ours_} / time of {other}, by columns")
        parts.append(markdown(["rows", *map(str, widths)], lines))
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any]) -> Figure | None:
    """A heat map a pass, rows by columns; the thresholds as lines."""
    ratios, thresholds = _ratios(record), _thresholds(record)
    ours_, other = _sides(record)
    if not ratios:
        return None
    widths = sorted({columns for by_shape in ratios.values() for _, columns in by_shape})
    counts = sorted({rows for by_shape in ratios.values() for rows, _ in by_shape})
    figure = plots.new_figure(4.2 * len(ratios) + 1, 1.8 + 0.36 * len(counts))
    all_axes = figure.subplots(1, len(ratios), squeeze=False)[0]
    image = None
    for axes, (pass_, by_shape) in zip(all_axes, ratios.items(), strict=True):
        grid = [[by_shape.get((count, width)) for width in widths] for count in counts]
        speeds = [[None if ratio is None else 1 / ratio for ratio in line] for line in grid]
        texts = [["" if s is None else f"{s:.2f}" for s in line] for line in speeds]
        image = plots.heat_map(
            axes, speeds, texts, [f"{c:,}" for c in counts], list(map(str, widths)), pass_
        )
        axes.set_xlabel("columns", fontsize=8)
        for at, width in enumerate(widths):
            if thresholds.get(width) in counts:
                edge = counts.index(thresholds[width]) - 0.5
                axes.plot([at - 0.5, at + 0.5], [edge, edge], color="black", linewidth=2)
    all_axes[0].set_ylabel("rows", fontsize=8)
    figure.suptitle(
        f"RMSNorm on {record['device']}: speed of {ours_} relative to {other}; "
        "below a black line every pass is faster",
        fontsize=11,
    )
    plots.color_bar(figure, image, list(all_axes), f"speed relative to {other}")
    return figure


def _ratios(record: dict[str, Any]) -> dict[str, dict[tuple[int, int], float]]:
    """By pass, then by (rows, columns)."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for pass_ in PASSES:
        for row in record["rows"]:
            words = row["case"].split()
            if len(words) == 3 and words[1] == pass_:
                rows, _, columns = words[0].partition("x")
                found.setdefault(pass_, {})[int(rows), int(columns)] = row["ratio"]
    return found


def _thresholds(record: dict[str, Any]) -> dict[int, int]:
    """By width; 0 for none."""
    rows = [row for row in record["rows"] if row["case"].endswith(" threshold")]
    return dict(sorted((int(row["case"].split()[0]), int(row["ours"])) for row in rows))


def _sides(record: dict[str, Any]) -> tuple[str, str]:
    """What stands against what."""
    names = {name for row in record["rows"] for name in row["peers"]}
    return ("the block path", "the row path") if "row" in names else ("ours", "PyTorch's")


def _in_words(threshold: int | None) -> str:
    if threshold is None:
        return "no row count from which every pass is faster"
    return f"every pass is faster from {threshold:,} rows on"


def _two_digits(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
