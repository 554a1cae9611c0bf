"""Tables and plot of a record of rms-norm."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.tables import Cell, by_columns, digits, document, figure, spread
from onelaunch.bench.studies.block_row.norm_cell import shape_of
from onelaunch.bench.studies.block_row.rms_norm.summary import best_time, summary

Record = dict[str, Any]

# Liger-Kernel#1238 on an RTX 5060 Ti: block path against row path, percent of time, by rows and
# columns; 768 columns is its control, which stays on the row path.
_WIDTHS = (64, 128, 256, 512, 768)
_PUBLISHED = {
    "full": {
        4096: (-67.9, -56.7, -46.9, -46.5, 0.0),
        8192: (-74.1, -63.7, -52.0, -46.5, 0.0),
        16384: (-79.4, -66.8, -55.3, -39.7, -0.2),
        32768: (-82.0, -68.7, -55.9, -42.0, -0.1),
    },
    "backward": {
        4096: (-69.8, -57.4, -54.0, -51.2, -0.9),
        8192: (-76.8, -64.2, -58.1, -52.7, 0.0),
        16384: (-80.5, -67.4, -62.2, -53.9, 0.2),
        32768: (-83.3, -71.3, -66.2, -54.4, 0.0),
    },
}
PUBLISHED = {
    pass_: {
        (rows, columns): value
        for rows, values in by_rows.items()
        for columns, value in zip(_WIDTHS, values, strict=True)
    }
    for pass_, by_rows in _PUBLISHED.items()
}

KINDS = {
    "full gpu": "Forward and backward, kernels only, us",
    "backward gpu": "Backward, kernels only, us",
    "forward gpu": "Forward, kernels only, us",
    "full host": "Forward and backward through autograd, host included, us",
    "backward host": "Backward through autograd, host included, us",
    "forward host": "Forward, host included, us",
    "memory": "Peak extra memory of one forward and backward pass, kB",
}
FORMS = ("row", "block", "source", "in place")
PEERS = ("torch", "torch.compile", "liger", "liger row", "liger source", "quack")


def table(record: Record) -> str:
    """Everything in Markdown: a summary, a table for each kind of case, the source's own table."""
    kinds = _by_kind(record)
    parts = ["\n".join(summary(kinds))]
    parts += [f"## {KINDS[kind]}\n\n{_table(kind, rows)}" for kind, rows in kinds.items()]
    parts += [
        f"## The published table on this device: {pass_}\n\n{text}"
        for pass_ in PUBLISHED
        if (text := _published_table(kinds.get(f"{pass_} gpu", [])))
    ]
    parts.append(_legend(kinds))
    return document(record, "RMSNorm on", *parts)


def draw(record: Record) -> plots.Figure | None:
    """Heat maps of every contender's speed relative to the best peer's, shape by shape. None where
    the record has neither forward and backward nor forward."""
    kinds = _by_kind(record)
    suffix = "gpu" if "full gpu" in kinds else "host"
    shown = [k for k in (f"full {suffix}", f"forward {suffix}") if k in kinds]
    if not shown:
        return None
    title = f"RMSNorm on {record['device']}; in the cells: speed relative to the shape's best peer"
    if any(row.get("in_cache") for kind in shown for row in kinds[kind]):
        title += "\n*: the buffers are small for the L2, calls need not go to memory"
    height = 2.2 + 0.27 * max(len(kinds[kind]) for kind in shown)
    figure, all_axes = plots.panels(len(shown), 8, height, title)
    for axes, kind in zip(all_axes, shown, strict=True):
        image = _draw_speeds(axes, kind, kinds[kind])
    plots.color_bar(figure, image, all_axes, "speed relative to the best peer")
    return figure


def _draw_speeds(axes: plots.Axes, kind: str, rows: list[dict[str, Any]]) -> Any:
    names = _names(rows)
    speeds: list[list[float | None]] = []
    for row in rows:
        best = best_time(row)
        times = [_time(row, name) for name in names]
        speeds.append([None if t is None or best is None else best / t for t in times])
    shapes = [_shape(row) + _in_cache(row) for row in rows]
    title = KINDS[kind].removesuffix(", us")
    return plots.heat_map(axes, speeds, shapes, list(map(_title, names)), title)


def _by_kind(record: Record) -> dict[str, list[dict[str, Any]]]:
    """The record's rows by kind of case, each kind in the order of the grid."""
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row in record["rows"]:
        kind = row["case"].partition(" ")[2]
        if kind in kinds:
            kinds[kind].append(row)
    for rows in kinds.values():
        rows.sort(key=lambda row: shape_of(row)[::-1])
    return {kind: rows for kind, rows in kinds.items() if rows}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The contenders of a table, ours first."""
    there = {name for row in rows for name in (*row["peers"], *row.get("forms", ()))}
    known = ("ours", *FORMS, *PEERS)
    return [name for name in known if name == "ours" or name in there]


def _time(row: dict[str, Any], name: str) -> float | None:
    if name == "ours":
        return row["ours"]
    return row["peers"].get(name, row.get("forms", {}).get(name))


def _table(kind: str, rows: list[dict[str, Any]]) -> str:
    def time_of(name: str) -> Cell:
        return lambda row: scaled(_time(row, name))

    def scaled(value: float | None) -> str:
        return digits(value if value is None or kind != "memory" else 1e-3 * value)

    columns: dict[str, Cell] = {"rows x columns": _shape}
    if any(row["floor"] is not None for row in rows):
        columns["floor"] = figure("floor", form=scaled)
    if any("planned" in row for row in rows):
        columns["planned"] = figure("planned", form=scaled)
    columns |= {_title(name): time_of(name) for name in _names(rows)}
    if kind != "memory":
        columns |= {
            "p20-p80": spread,
            "best peer": figure("best_peer", form=str),
            "ours / best": figure("ratio", form=".3f"),
        }
    if any("copy_share" in row for row in rows):
        columns["% of copy"] = lambda row: (
            f"{row['copy_share']:.0%}{_in_cache(row)}" if "copy_share" in row else "-"
        )
    return by_columns(rows, columns)


def _shape(row: dict[str, Any]) -> str:
    return str(row["case"].split()[0])


def _in_cache(row: dict[str, Any]) -> str:
    return "*" if row.get("in_cache") else ""


def _title(name: str) -> str:
    return f"ours: {name}" if name in FORMS else name


def _published_table(rows: list[dict[str, Any]]) -> str:
    """Percent of time that ours, and Liger by the source's rule, saves of Liger's row path."""
    columns: dict[str, Cell] = {
        "rows x columns": _shape,
        "Liger row, us": figure("peers", "liger row"),
        "ours, us": figure("ours"),
        "ours": _percent("percent_of_liger_row"),
        "Liger by source's rule": _percent("liger_source_percent"),
        "source, its device": _percent("published_percent"),
        "ours saves more": lambda row: (
            "yes" if row["percent_of_liger_row"] < row["published_percent"] else "no"
        ),
    }
    published = [row for row in rows if "published_percent" in row]
    return by_columns(published, columns) if published else ""


def _percent(key: str) -> Cell:
    return figure(key, form=lambda value: f"{value:+.1f}%")


def _legend(kinds: dict[str, list[dict[str, Any]]]) -> str:
    if "full gpu" not in kinds:
        return (
            "`ours` is the plain PyTorch form: there is no kernel on this device. Medians of calls "
            "back to back."
        )
    lines = [
        "`ours` is what the automatic choice runs; `ours: row` and `ours: block` force a path, "
        "`ours: source` is the published rule. Floor: the bytes that must move, at the bandwidth "
        "of a copy on the device. `*`: the buffers together hold less than twice the L2, so that "
        "the floor is none. Medians; p20-p80 are ours. Best peer: a variant of Liger is named only "
        "where it is over 1% faster than Liger as released.",
        "torch.compile's backward pass is that of a second compilation, which may run twice.",
    ]
    if "memory" in kinds:
        lines.append(
            "Memory: floor is y, dX and dW, planned that and the float32 partials of dW. Liger as "
            "released writes dX over the incoming gradient, hence its lower figure; so does "
            "`ours: in place`."
        )
    return " ".join(lines)
