"""What the record of rms-norm looks like as tables and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onelaunch.bench import plots
from onelaunch.bench.tables import figure as digits
from onelaunch.bench.tables import geometric_mean, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    "forward host": "Forward, host included, us",
    "memory": "Peak extra memory of one forward and backward pass, kB",
}
FORMS = ("row", "block", "source")
PEERS = ("torch", "torch.compile", "liger", "liger row", "liger source", "quack")


def table(record: Record) -> str:
    """Everything in Markdown: a summary, a table for each kind of case, the source's own table."""
    kinds = _by_kind(record)
    parts = [f"# RMSNorm on {record['device']}", "\n".join(_summary(kinds))]
    parts += [f"## {KINDS[kind]}\n\n{_table(kind, rows)}" for kind, rows in kinds.items()]
    parts += [
        f"## The published table on this device: {pass_}\n\n{text}"
        for pass_ in PUBLISHED
        if (text := _published_table(kinds.get(f"{pass_} gpu", [])))
    ]
    parts.append(_legend(kinds))
    return "\n\n".join(parts) + "\n"


def draw(record: Record) -> Figure | None:
    """Heat maps of every contender's speed relative to the best peer's, shape by shape; None where
    the record has neither."""
    kinds = _by_kind(record)
    suffix = "gpu" if "full gpu" in kinds else "host"
    panels = [k for k in (f"full {suffix}", f"forward {suffix}") if k in kinds]
    if not panels:
        return None
    most = max(len(kinds[kind]) for kind in panels)
    figure = plots.new_figure(7.5 * len(panels) + 1, 2.2 + 0.27 * most)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    image = None
    for axes, kind in zip(all_axes, panels, strict=True):
        rows = kinds[kind]
        names = _names(rows)
        times = [[_time(row, name) for name in names] for row in rows]
        best = [_best_peer(row) for row in rows]
        speeds = [
            [None if t is None or b is None else b / t for t in line]
            for line, b in zip(times, best, strict=True)
        ]
        texts = [[_cell_text(row, t) for t in line] for row, line in zip(rows, times, strict=True)]
        shapes = [row["case"].split()[0] for row in rows]
        title = KINDS[kind].removesuffix(", us")
        image = plots.heat_map(axes, speeds, texts, shapes, list(map(_title, names)), title)
    what = "% of the device's copy bandwidth" if suffix == "gpu" else "microseconds"
    figure.suptitle(f"RMSNorm on {record['device']}; in the cells: {what}", fontsize=11)
    plots.color_bar(figure, image, list(all_axes), "speed relative to the best peer of the shape")
    return figure


def _by_kind(record: Record) -> dict[str, list[dict[str, Any]]]:
    """The record's rows by kind of case, each kind in the order of the grid."""
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row in record["rows"]:
        kind = row["case"].partition(" ")[2]
        if kind in kinds:
            kinds[kind].append(row)
    for rows in kinds.values():
        rows.sort(key=lambda row: _shape(row)[::-1])
    return {kind: rows for kind, rows in kinds.items() if rows}


def _shape(row: dict[str, Any]) -> tuple[int, int]:
    rows, _, columns = row["case"].split()[0].partition("x")
    return int(rows), int(columns)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """The contenders of a table, ours first."""
    there = {name for row in rows for name in (*row["peers"], *row.get("forms", ()))}
    known = ("ours", *FORMS, *PEERS)
    return [name for name in known if name == "ours" or name in there]


def _time(row: dict[str, Any], name: str) -> float | None:
    if name == "ours":
        return row["ours"]
    return row["peers"].get(name, row.get("forms", {}).get(name))


def _best_peer(row: dict[str, Any]) -> float | None:
    return min(row["peers"].values(), default=None)


def _table(kind: str, rows: list[dict[str, Any]]) -> str:
    names = _names(rows)
    scale = 1e-3 if kind == "memory" else 1.0

    def scaled(value: float | None) -> str:
        return digits(None if value is None else value * scale)

    has_floor = any(row["floor"] is not None for row in rows)
    has_share = any("copy_share" in row for row in rows)
    header = ["rows x columns", *(["floor"] if has_floor else []), *map(_title, names)]
    if kind != "memory":
        header += ["p20-p80", "best peer", "ours / best"]
    header += ["% of copy"] if has_share else []
    lines = []
    for row in rows:
        line = [row["case"].split()[0]]
        line += [scaled(row["floor"])] if has_floor else []
        line += [scaled(_time(row, name)) for name in names]
        if kind != "memory":
            low, high = row["spread"] or (row["ours"], row["ours"])
            line += [f"{digits(low)}-{digits(high)}", row.get("best_peer", "-")]
            line += [f"{row['ratio']:.3f}" if "ratio" in row else "-"]
        if has_share:
            line.append(_share(row))
        lines.append(line)
    return markdown(header, lines)


def _title(name: str) -> str:
    return f"ours: {name}" if name in FORMS else name


def _share(row: dict[str, Any]) -> str:
    if "copy_share" not in row:
        return "-"
    return f"{100 * row['copy_share']:.0f}%{'*' if row.get('in_cache') else ''}"


def _published_table(rows: list[dict[str, Any]]) -> str:
    """Percent of time that ours, and Liger by the source's rule, saves of Liger's row path."""
    lines = []
    for row in rows:
        if "published_percent" in row:
            here, there = row["percent_of_liger_row"], row["published_percent"]
            lines.append(
                [
                    row["case"].split()[0],
                    digits(row["peers"]["liger row"]),
                    digits(row["ours"]),
                    f"{here:+.1f}%",
                    _signed(row.get("liger_source_percent")),
                    f"{there:+.1f}%",
                    "yes" if here < there else "no",
                ]
            )
    header = ["rows x columns", "Liger row, us", "ours, us", "ours", "Liger by source's rule"]
    header += ["source, its device", "ours saves more"]
    return markdown(header, lines) if lines else ""


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}%"


def _summary(kinds: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for kind, rows in kinds.items():
        rated = [row for row in rows if "ratio" in row]
        if not rated:
            continue
        mean = geometric_mean([1 / row["ratio"] for row in rated])
        worst = sorted(rated, key=lambda row: row["ratio"], reverse=True)[:3]
        told = ", ".join(
            f"{row['case'].split()[0]} {row['ratio']:.3f} of {row['best_peer']}" for row in worst
        )
        lines.append(
            f"- {kind}: {mean:.3f}x the speed of the best peer (geometric mean of {len(rated)}); "
            f"slowest against it: {told}"
        )
        for name in ("torch", "liger") if kind == "full host" else ():
            ratios = [r["ours"] / r["peers"][name] for r in rows if r["peers"].get(name)]
            if ratios:
                lines.append(f"- {kind}: {min(ratios):.2f} to {max(ratios):.2f} of {name}'s time")
    for pass_ in PUBLISHED:
        rows = [
            row
            for row in kinds.get(f"{pass_} gpu", [])
            if "published_percent" in row and _shape(row)[1] <= 512
        ]
        if rows:
            more = sum(row["percent_of_liger_row"] < row["published_percent"] for row in rows)
            lines.append(
                f"- {pass_}: saves more of Liger's row path than the source did in {more} of "
                f"{len(rows)} shapes up to 512 wide"
            )
    return lines


def _legend(kinds: dict[str, list[dict[str, Any]]]) -> str:
    if "full gpu" not in kinds:
        return (
            "`ours` is the plain PyTorch form: there is no kernel on this device. Medians of calls "
            "back to back."
        )
    backward = kinds.get("backward gpu", [])
    differences = {name for row in backward for name in row.get("full_minus_forward", ())}
    lines = [
        "`ours` is what the automatic choice runs; `ours: row` and `ours: block` force a path, "
        "`ours: source` is the published rule. Floor: the bytes that must move, at the bandwidth "
        "of a copy on the device. `*`: all buffers fit the L2, so that the floor is none. "
        "Medians; p20-p80 are ours.",
    ]
    if differences:
        lines.append(f"Backward as full minus forward: {', '.join(sorted(differences))}.")
    return " ".join(lines)


def _cell_text(row: dict[str, Any], time: float | None) -> str:
    if time is None:
        return ""
    if row["floor"] is None:
        return digits(time)
    return f"{100 * row['floor'] / time:.0f}{'*' if row.get('in_cache') else ''}"
