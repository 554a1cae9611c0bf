"""What the record of fusion-depth looks like as tables and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onelaunch.bench import plots
from onelaunch.bench.tables import figure as digits
from onelaunch.bench.tables import markdown, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
Rows = list[dict[str, Any]]

# The published figures, on an M1 Pro's neural engine, us. FFN layers: one layer, 12 in one call, 12
# calls. Whole models: one call, two a layer, how many those are, seconds of compiling.
PUBLISHED_FFN = {
    "64/128": (183, 247, 2197),
    "288/768": (218, 705, 2611),
    "768/2048": (429, 1839, 5153),
}
PUBLISHED_MODELS = {"stories15m": (728, 3039, 12, 1.0), "stories110m": (5081, 15227, 24, 4.2)}
COLORS = ("#1f5a8f", "#d08020", "#1a7a36", "#b03060", "#6a51a3")


def table(record: Record) -> str:
    """In Markdown: the published tables with ours beside them, every depth, the price of a call."""
    rows = record["rows"]
    parts = [
        f"# A forward by how much one call holds, on {record['device']}",
        provenance(record),
        "Medians in us; `speedup` is the median of the rounds' ratios. Tokens stand at the "
        "positions from 0 on. Every way of a line does the same work.",
        f"## FFN layers alone\n\n{_ffn_table(rows)}",
        "One layer, timed again and again, finds its weights in a nearer cache than twelve do. How "
        "many tokens the published figures are of was not told.",
        f"## Whole models: one call against two a layer\n\n{_model_table(rows)}",
        f"## Every depth\n\n{_depth_table(rows)}",
        f"## The price of a call\n\n{_price_table(rows)}",
        "Least squares of time = rest + price x calls in every round; the median of the rounds. "
        "Where a forward takes milliseconds its own noise is larger than its calls: see p20-p80.",
    ]
    return "\n\n".join(parts) + "\n"


def _by_case(rows: Rows) -> dict[tuple[str, int, int], dict[str, dict[str, Any]]]:
    """Rows of ways by (model, tokens, threads), then by depth."""
    found: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "depth" in row:
            key = row["model"], row["tokens"], row["threads"]
            found.setdefault(key, {})[row["depth"]] = row
    return found


def _is_ffn(model: str) -> bool:
    return "/" in model


def _ffn_table(rows: Rows) -> str:
    lines = []
    for (model, tokens, threads), ways in _by_case(rows).items():
        if not _is_ffn(model):
            continue
        published = PUBLISHED_FFN.get(model) if tokens == 1 else None
        theirs = ["-"] * 4
        if published:
            theirs = [digits(value) for value in published]
            theirs.append(f"{published[2] / published[1]:.1f}x")
        lines.append(
            [
                f"{model}, {tokens} tok., {threads} thr.",
                digits(ways["one layer"]["ours"]),
                digits(ways["all"]["ours"]),
                digits(ways["1"]["ours"]),
                f"{ways['1']['speed_of_all']:.2f}x",
                *theirs,
            ]
        )
    ours = ["1 layer", "12 in one call", "12 calls", "speedup"]
    header = ["dim/hidden", *ours, *(f"published: {name}" for name in ours)]
    return markdown(header, lines)


def _model_table(rows: Rows) -> str:
    compiling = next((row["ours"] for row in rows if row["case"] == "compilation"), None)
    lines = []
    for (model, tokens, threads), ways in _by_case(rows).items():
        if _is_ffn(model):
            continue
        half = ways["half"]
        published = PUBLISHED_MODELS.get(model) if tokens == 1 else None
        theirs = ["-"] * 4
        if published:
            one, two, calls, seconds = published
            theirs = [digits(one), f"{two:,} ({calls})", f"{two / one:.2f}x", f"{seconds:.1f}"]
        lines.append(
            [
                f"{model} 1x{tokens}, {threads} thr.",
                digits(ways["all"]["ours"]),
                f"{digits(half['ours'])} ({half['calls']})",
                f"{half['speed_of_all']:.2f}x",
                digits(compiling),
                *theirs,
            ]
        )
    ours = ["one call", "two a layer (calls)", "speedup", "compiling, s"]
    text = markdown(["model", *ours, *(f"published: {name}" for name in ours)], lines)
    why = (
        "Ours has embed and head in it, as calls of their own where a layer has two; one compiled "
        "program serves every model and depth."
    )
    return f"{text}\n\n{why}"


def _depth_table(rows: Rows) -> str:
    cases = _by_case(rows)
    numbers = sorted({int(d) for ways in cases.values() for d in ways if d.isdigit()})
    depths = ["stage", "half", *map(str, numbers), "all"]
    lines = []
    for (model, tokens, threads), ways in cases.items():
        cells = [
            f"{digits(ways[d]['ours'])} ({ways[d]['calls']})" if d in ways else "-" for d in depths
        ]
        speed = f"{ways['stage']['speed_of_all']:.2f}x"
        lines.append([f"{model} 1x{tokens}, {threads} thr.", *cells, speed])
    return markdown(["us (calls)", *depths, "stage / all"], lines)


def _price_table(rows: Rows) -> str:
    lines = [
        [
            f"{row['model']} 1x{row['tokens']}, {row['threads']} thr.",
            digits(row["ours"]),
            "-".join(digits(value) for value in row["spread"] or ()),
            digits(row["rest"]["median"]),
        ]
        for row in rows
        if row.get("price_of_a_call")
    ]
    return markdown(["us", "a call", "p20-p80", "rest"], lines)


def draw(record: Record) -> Figure | None:
    """Time against calls at the most threads, one line a model; one panel for each number of
    tokens. None where no whole model was timed."""
    cases = {key: ways for key, ways in _by_case(record["rows"]).items() if not _is_ffn(key[0])}
    if not cases:
        return None
    most = max(threads for _, _, threads in cases)
    counts = sorted({tokens for _, tokens, _ in cases})
    models = list(dict.fromkeys(model for model, _, _ in cases))
    figure = plots.new_figure(5 * len(counts), 4.2)
    for axes, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for model, color in zip(models, COLORS, strict=False):
            ways = cases.get((model, tokens, most), {})
            points = sorted((row["calls"], row["ours"]) for row in ways.values())
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set_xlabel("calls a forward")
        axes.set_ylabel("us a forward")
        axes.set_title(f"{tokens} token{'s' if tokens > 1 else ''} at once", fontsize=10)
        axes.legend(fontsize=8)
    figure.suptitle(f"A forward by its calls, {most} threads, {record['device']}", fontsize=10)
    return figure
