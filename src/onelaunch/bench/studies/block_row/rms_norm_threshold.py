"""rms-norm-threshold: from how many rows on a program should hold several of them.

The published rule set its constant in this way: the lowest row count from which the block path
beats the row path, for every width and for all of the rule's widths together. Ratios within a
hundredth of 1 are ties, and decide nothing. The published sentence itself is of tiles of 16 rows:
`paths` tests it on our kernels in that form and on Liger's, at its own widths and row counts. On a
CPU, which has neither path, the plain form is compared with PyTorch's RMSNorm instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from onelaunch.bench.core import plots
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.tables import document, markdown
from onelaunch.bench.peers.rms_norm import (
    Contender,
    has_kernel,
    liger_paths,
    ours,
    peers,
    source_paths,
)
from onelaunch.bench.studies.block_row import paths
from onelaunch.bench.studies.block_row.findings import sentence_findings as findings
from onelaunch.bench.studies.block_row.norm_cell import (
    PASSES,
    Cell,
    Made,
    each_reason_once,
    host_times,
    kernel_times,
    make,
    shape_of,
)
from onelaunch.bench.studies.block_row.paths import TIE, Ratios
from onelaunch.bench.studies.block_row.rms_norm import row_of
from onelaunch.operators.devices import multiprocessors
from onelaunch.operators.rms_norm.plan import (
    BLOCK_ROW_MAX_BLOCK_SIZE,
    BLOCK_ROW_MIN_ROWS,
    backward_plan,
    forward_plan,
)

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "us"

ROWS = tuple(2**n for n in range(8, 17))  # 256 to 65,536
COLUMNS = tuple(2**n for n in range(5, 11))  # 32 to 1,024
QUICK_ROWS, QUICK_COLUMNS = (256, 4096, 65536), (64, 512)
CPU_ROWS, CPU_COLUMNS = (256, 1024, 4096), (32, 128, 512)
CPU_QUICK_ROWS, CPU_QUICK_COLUMNS = (256, 1024), (64, 256)

SAMPLES = 15
CPU_CALLS, CPU_SAMPLES = 20, 5


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every shape and pass; yields a row each."""
    place = torch.device(device)
    on_gpu = has_kernel(place, log)
    log = each_reason_once(log)
    if on_gpu:
        rows = QUICK_ROWS if quick else ROWS
        columns = QUICK_COLUMNS if quick else COLUMNS
    else:
        rows = CPU_QUICK_ROWS if quick else CPU_ROWS
        columns = CPU_QUICK_COLUMNS if quick else CPU_COLUMNS
    contenders = make(_contenders(place), log)
    of_the_sentence = make([*source_paths(), *liger_paths(log)] if on_gpu else [], log)
    stream = torch.cuda.Stream(place) if on_gpu else None
    for width in columns:
        for count in rows:
            there = list(contenders)
            if count in paths.ROWS and width in paths.WIDTHS:
                there += of_the_sentence
            with torch.cuda.stream(stream):
                timed = list(_shape(count, width, place, there, log))
            torch.cuda.empty_cache()  # a graph's memory is its own until this
            yield from timed


def _contenders(device: torch.device) -> list[Contender]:
    """`ours`, the block path (on a CPU the plain form), and what it is compared with."""
    forms = {c.name: c for c in ours()}
    if device.type != "cuda":
        plain_torch = next(c for c in peers(device, lambda line: None) if c.name == "torch")
        return [forms["ours"], plain_torch]
    return [
        Contender("ours", forms["block"].fresh, form=True),
        Contender("row", forms["row"].fresh),
    ]


def _shape(
    rows: int, columns: int, device: torch.device, made: Sequence[Made], log: Log
) -> Iterator[Row]:
    """The rows of one shape: the first contender compared with the second, the others as forms."""
    on_gpu = device.type == "cuda"
    first, second, *others = (each.contender.name for each in made)
    cell = Cell(rows, columns, torch.bfloat16 if on_gpu else torch.float32, device)
    notes = _notes(cell) if on_gpu else {"dtype": "float32"}
    words = []
    for pass_ in PASSES:
        if on_gpu:
            times = kernel_times(cell, pass_, made, SAMPLES, log)
        else:
            times = host_times(cell, pass_, made, CPU_CALLS, CPU_SAMPLES, log)
        if {first, second} <= times.keys():
            case = f"{cell.shape} {pass_} {'gpu' if on_gpu else 'host'}"
            row = row_of(case, times, {"ours", *others})
            row.notes |= notes
            words.append(f"{pass_} {row.notes['ratio']:.2f}")
            yield row
    log(f"{cell.shape}, of the time of {second}: {', '.join(words) or 'nothing timed'}")


def _notes(cell: Cell) -> dict[str, object]:
    """The note of what `auto` would take, on a device of how many multiprocessors."""
    count = multiprocessors(cell.device)
    facts = (cell.rows, cell.columns, cell.dtype.itemsize, count)
    auto = {"forward": forward_plan(*facts).kernel, "backward": backward_plan(*facts).kernel}
    return {"dtype": "bfloat16", "multiprocessors": count, "auto": auto}


def table(record: dict[str, Any]) -> str:
    """The record's tables in Markdown: the thresholds, then block time over row time by width and
    row count."""
    ratios = _ratios(record)
    ours_, other = _sides(record)
    widths, counts = _axes(ratios)
    parts = [
        f"A pass of {ours_} wins below {1 - TIE:.2f} of the time of {other}, loses above "
        f"{1 + TIE:.2f}, and ties between. Threshold: the lowest row count at which a pass wins, "
        "and from which on none loses, there and at every larger count measured.",
        _threshold_table(record, ratios),
    ]
    for pass_, by_shape in ratios.items():
        parts.append(f"## {pass_}: time of {ours_} / time of {other}, by columns")
        parts.append(paths.ratio_table(by_shape, counts, widths))
    parts += paths.tables(record)
    return document(record, "RMSNorm, when several rows in a program pay, on", *parts)


def _threshold_table(record: dict[str, Any], ratios: Ratios) -> str:
    widths = _axes(ratios)[0]
    counts = {row["multiprocessors"] for row in record["rows"] if "multiprocessors" in row}
    per = counts.pop() if len(counts) == 1 else None
    header = ["columns", "from rows", "rows a multiprocessor", "auto: forward", "auto: backward"]
    lines = [
        [str(width), *_counted(_threshold(ratios, width), per)]
        + [_auto_from(record, width, pass_) for pass_ in ("forward", "backward")]
        for width in widths
    ]
    narrow = [width for width in widths if width <= BLOCK_ROW_MAX_BLOCK_SIZE]
    if narrow:
        name = f"all to {BLOCK_ROW_MAX_BLOCK_SIZE}"
        lines.append([name, *_counted(_threshold(ratios, *narrow), per), "-", "-"])
        published = f"{BLOCK_ROW_MIN_ROWS:,}"
        lines.append([f"published, to {BLOCK_ROW_MAX_BLOCK_SIZE}", published, "-", "-", "-"])
    return markdown(header, lines)


def _counted(count: int | None, multiprocessors: int | None) -> list[str]:
    if count is None:
        return ["none", "-"]
    return [f"{count:,}", f"{count / multiprocessors:.1f}" if multiprocessors else "-"]


def _auto_from(record: dict[str, Any], width: int, pass_: str) -> str:
    """The measured row count from which `auto` takes several rows a program."""
    chosen = {
        shape_of(row)[0]: row["auto"][pass_]
        for row in record["rows"]
        if "auto" in row and shape_of(row)[1] == width
    }
    if not chosen:
        return "-"
    blocks = [count for count, kernel in chosen.items() if kernel == "block"]
    return f"from {min(blocks):,}" if blocks else "rows"


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """A heat map a pass, rows by columns; the thresholds as lines."""
    ratios = _ratios(record)
    ours_, other = _sides(record)
    if not ratios:
        return None
    widths, counts = _axes(ratios)
    figure = plots.new_figure(4.2 * len(ratios) + 1, 1.8 + 0.36 * len(counts))
    all_axes = figure.subplots(1, len(ratios), squeeze=False)[0]
    image = None
    for axes, (pass_, by_shape) in zip(all_axes, ratios.items(), strict=True):
        grid = [[by_shape.get((count, width)) for width in widths] for count in counts]
        speeds = [[None if ratio is None else 1 / ratio for ratio in line] for line in grid]
        image = plots.heat_map(
            axes, speeds, [f"{c:,}" for c in counts], list(map(str, widths)), pass_
        )
        axes.set_xlabel("columns", fontsize=8)
        for at, width in enumerate(widths):
            if (threshold := _threshold(ratios, width)) is not None:
                edge = counts.index(threshold) - 0.5
                axes.plot([at - 0.5, at + 0.5], [edge, edge], color="black", linewidth=2)
    all_axes[0].set_ylabel("rows", fontsize=8)
    figure.suptitle(
        f"RMSNorm on {record['device']}: speed of {ours_} relative to {other}; "
        "below a black line no pass is slower",
        fontsize=11,
    )
    plots.color_bar(figure, image, list(all_axes), f"speed relative to {other}")
    return figure


def _ratios(record: dict[str, Any]) -> Ratios:
    ratios: Ratios = {}
    for pass_ in PASSES:
        for row in record["rows"]:
            words = row["case"].split()
            if len(words) == 3 and words[1] == pass_:
                ratios.setdefault(pass_, {})[shape_of(row)] = row["ratio"]
    return ratios


def _axes(ratios: Ratios) -> tuple[list[int], list[int]]:
    """Widths and row counts that were measured."""
    shapes = {shape for by_shape in ratios.values() for shape in by_shape}
    return sorted({columns for _, columns in shapes}), sorted({rows for rows, _ in shapes})


def _threshold(ratios: Ratios, *widths: int) -> int | None:
    """The threshold of several widths together: no pass of any of them may lose."""
    return paths.wins_from(ratios, PASSES, widths, ties=True)


def _sides(record: dict[str, Any]) -> tuple[str, str]:
    """The two sides of the comparison."""
    by_paths = any("row" in row["peers"] for row in record["rows"])
    return ("the block path", "the row path") if by_paths else ("ours", "PyTorch's")
