"""What the record of fusion-depth looks like as tables and as a picture.

A row is of a model, a number of tokens, and a variant: how many threads, or how it was launched.
What no row of a record has is left out of its tables.
"""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown, spread

Record = dict[str, Any]
Row = dict[str, Any]
Rows = list[Row]
Key = tuple[str, int, str]
Ways = dict[str, Row]

FFNS = {
    ("64/128", 1): "ffn-64", ("128/256", 1): "ffn-128", ("288/768", 1): "ffn-288",
    ("288/768", 128): "ffn-288-128", ("768/2048", 1): "ffn-768",
}  # fmt: skip
"""The published rows of feed-forward layers, by name and tokens; 1 stands for a number that was not
told."""
MODELS = {"stories15m": "whole-15m", "stories110m": "whole-110m"}
PARTS = {("stories110m", 4): "part-110m-4", ("stories110m", 8): "part-110m-8"}
"""Of a model's first layers, by their number."""

LAUNCHED = (
    "A call is a kernel launch. `one by one`: launched from Python, one after another, the host's "
    "part with them; `graph`: the same launches replayed as a CUDA graph. One kernel holds all "
    "stages, whichever a launch runs, and is compiled once for all ways of a case. Logits are of "
    "every position; where layers are timed alone, embed is in the first call."
)


def table(record: Record) -> str:
    """In Markdown: the published tables with ours beside them, every depth, the price of a call."""
    rows = record["rows"]
    cases = by_case(rows)
    ffns = {key: ways for key, ways in cases.items() if _part(key[0]) == "FFN"}
    attentions = {key: ways for key, ways in cases.items() if _part(key[0]) == "attention"}
    parts = [
        "Medians in us; `speedup` is the median of the rounds' ratios. Tokens stand at the "
        "positions from 0 on. Every way of a line does the same work."
    ]
    if any("launched" in row for row in rows):
        parts.append(LAUNCHED)
    parts += [
        f"## FFN layers alone\n\n{_block_table('dim/hidden', ffns)}",
        "One layer, timed again and again, finds its weights in a nearer cache than twelve do. How "
        "many tokens the published figures beside 1 token are of was not told.",
    ]
    if attentions:
        parts.append(f"## Attention layers alone\n\n{_block_table('dim/heads', attentions)}")
    parts.append(f"## Whole models: one call against two a layer\n\n{_model_table(rows)}")
    if any("halves" in row for row in rows):
        parts.append(f"## The first layers in one call\n\n{_layers_table(cases)}")
    parts.append(f"## Every depth\n\n{_depth_table(cases)}")
    if any("speed_against" in row for row in rows):
        parts.append(f"## Beside the staged form and PyTorch\n\n{_peers_table(cases)}")
    parts += [
        f"## The price of a call\n\n{_price_table(rows, 'call')}",
        "Least squares of time = rest + price x calls in every round; the median of the rounds. "
        "Where a forward takes milliseconds its own noise is larger than its calls: see p20-p80.",
    ]
    if any("price_of_a_layer" in row for row in rows):
        parts += [
            f"## The price of a layer\n\n{_price_table(rows, 'layer')}",
            "The same of time = rest + price x layers, over the first layers of a model in one "
            "call, behind embed and without head.",
        ]
    return document(record, "A forward by how much one call holds, on", *parts)


def by_case(rows: Rows) -> dict[Key, Ways]:
    """Rows of ways by (model, tokens, variant), then by depth."""
    found: dict[Key, Ways] = {}
    for row in rows:
        if "depth" in row:
            key = row["model"], row["tokens"], _variant(row)
            found.setdefault(key, {})[row["depth"]] = row
    return found


def _variant(row: Row) -> str:
    return row["launched"] if "launched" in row else f"{row['threads']} thr."


def _part(model: str) -> str:
    """What of its layers a model holds."""
    if "heads" in model:
        return "attention"
    return "FFN" if "/" in model else "all"


def _block_table(first: str, cases: dict[Key, Ways]) -> str:
    ours = ["1 layer", "12 in one call", "12 calls", "speedup"]
    compiled = any("compiling_s" in ways["all"] for ways in cases.values())
    published = [_ffn_figures(FFNS.get(key[:2])) for key in cases]
    lines = []
    for ((model, tokens, variant), ways), figures in zip(cases.items(), published, strict=True):
        line = [
            f"{model.removesuffix(' heads')}, {tokens} tok., {variant}",
            digits(ways["one layer"]["ours"]),
            digits(ways["all"]["ours"]),
            digits(ways["1"]["ours"]),
            f"{ways['1']['speed_of_all']:.2f}x",
        ]
        theirs = ["-"] * 4
        if figures:
            theirs = [digits(value) for value in figures[:3]]
            theirs.append(f"{figures[2] / figures[1]:.1f}x")
        if compiled:
            line.append(digits(ways["all"].get("compiling_s")))
            theirs.append(digits(figures[3] if figures else None))
        lines.append(line + (theirs if any(published) else []))
    if compiled:
        ours.append("compiling, s")
    header = [first, *ours]
    if any(published):
        header += [f"published: {name}" for name in ours]
    return markdown(header, lines)


def _ffn_figures(key: str | None) -> tuple[float, ...]:
    """Published: us of one layer, of 12 in one call, in 12 calls; seconds of compiling."""
    if key is None:
        return ()
    values = PUBLISHED[key].values
    us = (float(values[name]) for name in ("1 layer, us", "12 in one, us", "12 apart, us"))
    return (*us, float(values["compiling, ms"]) / 1e3)


def _whole_figures(key: str) -> tuple[float, float, float, float]:
    """Published: us in one call, and two a layer; how many those are; seconds of compiling."""
    values = PUBLISHED[key].values
    one, two, calls, seconds = (
        float(values[name])
        for name in ("one program, us", "two a layer, us", "calls", "compiling, s")
    )
    return one, two, calls, seconds


def _model_table(rows: Rows) -> str:
    compiling = next((row["ours"] for row in rows if row["case"] == "compilation"), None)
    cases = {key: ways for key, ways in by_case(rows).items() if _part(key[0]) == "all"}
    fewest = {model: min(n for m, n, _ in cases if m == model) for model, _, _ in cases}
    lines = []
    for (model, tokens, variant), ways in cases.items():
        half = ways["half"]
        theirs = ["-"] * 4
        if model in MODELS and tokens == fewest[model]:
            one, two, calls, seconds = _whole_figures(MODELS[model])
            theirs = [digits(one), f"{two:,.0f} ({calls:g})", f"{two / one:.2f}x", f"{seconds:.1f}"]
        lines.append(
            [
                f"{model} 1x{tokens}, {variant}",
                digits(ways["all"]["ours"]),
                f"{digits(half['ours'])} ({half['calls']})",
                f"{half['speed_of_all']:.2f}x",
                digits(ways["all"].get("compiling_s", compiling)),
                *theirs,
            ]
        )
    ours = ["one call", "two a layer (calls)", "speedup", "compiling, s"]
    text = markdown(["model", *ours, *(f"published: {name}" for name in ours)], lines)
    why = "Ours has embed and head in it, as calls of their own where a layer has two"
    if compiling:
        why += "; one compiled program serves every model and depth"
    return f"{text}\n\n{why}."


def _layers_table(cases: dict[Key, Ways]) -> str:
    lines = []
    for (model, tokens, variant), ways in cases.items():
        for row in ways.values():
            if "halves" not in row:
                continue
            halves = row["halves"]
            theirs = ["-"] * 3
            if key := PARTS.get((model, row["layers"])):
                one, two, calls, _ = _whole_figures(key)
                whole = _whole_figures(MODELS[model])[1]
                theirs = [f"{two:,.0f} ({calls:g})", f"{two / one:.2f}x", f"{whole / one:.2f}x"]
                theirs[0] = f"{one:,.0f} / {theirs[0]}"
            lines.append(
                [
                    f"{model} 1x{tokens}, {row['layers']} layers, {variant}",
                    digits(row["ours"]),
                    f"{digits(halves['median'])} ({halves['calls']})",
                    f"{row['speed_against_halves']:.2f}x",
                    f"{row['speed_against_whole']:.2f}x",
                    *theirs,
                ]
            )
    header = [
        "us", "one call", "two a layer (calls)", "like for like", "whole model's halves / one call",
        "published: one / two a layer", "published: like for like", "published: whole / one call",
    ]  # fmt: skip
    why = (
        "The published 7.70x for 4 layers divides all 12 layers, two calls each, by 4 in one call; "
        "of the same 4 layers it is 2.57x."
    )
    return f"{markdown(header, lines)}\n\n{why}"


def _depth_table(cases: dict[Key, Ways]) -> str:
    numbers = sorted({int(d) for ways in cases.values() for d in ways if d.isdigit()})
    depths = ["stage", "half", *map(str, numbers), "all"]
    lines = []
    for (model, tokens, variant), ways in cases.items():
        cells = [
            f"{digits(ways[d]['ours'])} ({ways[d]['calls']})" if d in ways else "-" for d in depths
        ]
        speed = f"{ways['stage']['speed_of_all']:.2f}x"
        lines.append([f"{model} 1x{tokens}, {variant}", *cells, speed])
    return markdown(["us (calls)", *depths, "stage / all"], lines)


def _peers_table(cases: dict[Key, Ways]) -> str:
    """Of every model the fastest of its depths, however it was launched, beside the peers."""
    fastest: dict[tuple[str, int], tuple[str, Row]] = {}
    for (model, tokens, variant), ways in cases.items():
        for depth, row in ways.items():
            best = fastest.get((model, tokens))
            if "speed_against" in row and (best is None or row["ours"] < best[1]["ours"]):
                fastest[model, tokens] = f"{depth}, {variant}", row
    peers = list(dict.fromkeys(p for _, row in fastest.values() for p in row["speed_against"]))
    lines = []
    for (model, tokens), (way, row) in fastest.items():
        cells = [digits(row["peers"].get(peer)) for peer in peers]
        least = min(row["speed_against"].values())
        label = f"{model} 1x{tokens}"
        lines.append([label, f"{digits(row['ours'])} ({way})", *cells, f"{least:.2f}x"])
    return markdown(["us", "fastest depth", *peers, "best of these / fastest"], lines)


def _price_table(rows: Rows, of: str) -> str:
    lines = [
        [
            f"{row['model']} 1x{row['tokens']}, {_variant(row)}",
            digits(row["ours"]),
            spread(row),
            digits(row["rest"]["median"]),
        ]
        for row in rows
        if row.get(f"price_of_a_{of}")
    ]
    return markdown(["us", f"a {of}", "p20-p80", "rest"], lines)


def draw(record: Record) -> plots.Figure | None:
    """Time against calls, one line a model; a panel for each number of tokens and each variant, of
    several numbers of threads the most. None where no whole model was timed."""
    rows = record["rows"]
    cases = {key: ways for key, ways in by_case(rows).items() if _part(key[0]) == "all"}
    if not cases:
        return None
    most = max((row.get("threads", 0) for row in rows if "depth" in row), default=0)
    shown = sorted({key[1:] for key in cases if not most or key[2] == f"{most} thr."})
    threads = f"{most} threads, " if most else ""
    title = f"A forward by its calls, {threads}{record['device']}"
    figure, all_axes = plots.panels(len(shown), 5, 4.2, title)
    for axes, (tokens, variant) in zip(all_axes, shown, strict=True):
        for model in dict.fromkeys(model for model, _, _ in cases):
            ways = cases.get((model, tokens, variant), {})
            whole = [row for row in ways.values() if "speed_of_all" in row]
            if points := sorted((row["calls"], row["ours"]) for row in whole):
                axes.plot(*zip(*points, strict=True), "o-", label=model)
        title = f"{tokens} token{'s' if tokens > 1 else ''} at once"
        title = title if most else f"{title}, {variant}"
        plots.label(axes, "calls a forward", "us a forward", title, log="xy")
    return figure
