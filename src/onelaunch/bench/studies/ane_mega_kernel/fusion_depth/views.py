"""The tables and the picture of fusion-depth's record. What no row of a record has is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from onelaunch.bench.core import plots
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown
from onelaunch.bench.core.views import median_and_spread, published, table_of

Row = dict[str, Any]

FFNS = {
    ("64/128", 1): "ffn-64", ("128/256", 1): "ffn-128", ("288/768", 1): "ffn-288",
    ("288/768", 128): "ffn-288-128", ("768/2048", 1): "ffn-768",
}  # fmt: skip
"""The published rows of feed-forward layers, by name and tokens; 1 stands for a number that was not
published."""
MODELS = {"stories15m": "whole-15m", "stories110m": "whole-110m"}
PARTS = {("stories110m", 4): "part-110m-4", ("stories110m", 8): "part-110m-8"}
"""Of a model's first layers, by their number."""

LAUNCHED = (
    "A call is a kernel launch. `one by one`: launched from Python, one after another, the host's "
    "part with them; `graph`: the same launches replayed as a CUDA graph. One kernel holds all "
    "stages, whichever a launch runs, and is compiled once for all ways of a case. Logits are of "
    "every position; where layers are timed alone, embed is in the first call."
)


class Forward(NamedTuple):
    """The rows of one forward by way. `variant`: how many threads, or how it was launched."""

    model: str
    tokens: int
    variant: str
    ways: dict[str, Row]

    @property
    def label(self) -> str:
        return f"{self.model} 1x{self.tokens}, {self.variant}"

    @property
    def part(self) -> str:
        """The part of the layers that the model holds: "FFN", "attention" or "all"."""
        if "heads" in self.model:
            return "attention"
        return "FFN" if "/" in self.model else "all"

    def us(self, way: str, calls: bool = False) -> str:
        """The median of a way, with its number of calls; a dash where it was not timed."""
        if way not in self.ways:
            return "-"
        row = self.ways[way]
        return digits(row["ours"]) + (f" ({row['calls']})" if calls else "")


def variant(row: Mapping[str, Any]) -> str:
    """The number of threads of a row, or how it was launched."""
    return row["launched"] if "launched" in row else f"{row['threads']} thr."


def forwards(rows: Sequence[Row]) -> list[Forward]:
    """The rows of ways, by forward, in the record's order."""
    by_key: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        if "depth" in row:
            key = row["model"], row["tokens"], variant(row)
            by_key.setdefault(key, {})[row["depth"]] = row
    return [Forward(*key, ways) for key, ways in by_key.items()]


def fewest_tokens(of: Sequence[Forward], model: str) -> int:
    """The number of tokens at which calls cost the largest share."""
    return min(each.tokens for each in of if each.model == model)


def table(record: Mapping[str, Any]) -> str:
    """The record's tables in Markdown: the published tables next to ours, every depth, the price of
    a call."""
    rows = record["rows"]
    every = forwards(rows)
    ffns, attentions, models = (
        [each for each in every if each.part == part] for part in ("FFN", "attention", "all")
    )
    parts = [
        "Medians in us; `speedup` is the median of the rounds' ratios. Tokens stand at the "
        "positions from 0 on. Every way of a line does the same work."
    ]
    if any("launched" in row for row in rows):
        parts.append(LAUNCHED)
    parts += [
        f"## FFN layers alone\n\n{_block_table('dim/hidden', ffns)}",
        "One layer, timed again and again, finds its weights in a nearer cache than twelve do. The "
        "study does not say how many tokens the figures next to ours of 1 token are of.",
    ]
    if attentions:
        parts.append(f"## Attention layers alone\n\n{_block_table('dim/heads', attentions)}")
    compiling = next((row["ours"] for row in rows if row["case"] == "compilation"), None)
    parts.append(
        f"## Whole models: one call against two a layer\n\n{_model_table(models, compiling)}"
    )
    if any("halves" in row for row in rows):
        parts.append(f"## The first layers in one call\n\n{_layers_table(every)}")
    parts.append(f"## Every depth\n\n{_depth_table(every)}")
    if any("speed_against" in row for row in rows):
        parts.append(f"## Compared with the staged form and PyTorch\n\n{_peers_table(every)}")
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
    return document(dict(record), "A forward by how much one call holds, on", *parts)


def _block_table(head: str, blocks: Sequence[Forward]) -> str:
    with_seconds = any("compiling_s" in each.ways["all"] for each in blocks)
    with_published = any((each.model, each.tokens) in FFNS for each in blocks)
    ours = ["1 layer", "12 in one call", "12 calls", "speedup"]
    ours += ["compiling, s"] if with_seconds else []
    lines = []
    for each in blocks:
        ways = each.ways
        name = f"{each.model.removesuffix(' heads')}, {each.tokens} tok., {each.variant}"
        line = [name, each.us("one layer"), each.us("all"), each.us("1")]
        line.append(f"{ways['1']['speed_of_all']:.2f}x")
        theirs = ["-"] * 5
        if key := FFNS.get((each.model, each.tokens)):
            names = "1 layer, us", "12 in one, us", "12 apart, us"
            one, fused, apart = (published(key, name) for name in names)
            theirs = [digits(one), digits(fused), digits(apart), f"{apart / fused:.1f}x"]
            theirs.append(digits(published(key, "compiling, ms") / 1e3))
        line += [digits(ways["all"].get("compiling_s"))] if with_seconds else []
        lines.append(line + (theirs[: len(ours)] if with_published else []))
    theirs_too = [f"published: {name}" for name in ours] if with_published else []
    return markdown([head, *ours, *theirs_too], lines)


def _model_table(models: Sequence[Forward], compiling: float | None) -> str:
    lines = []
    for each in models:
        theirs = ["-"] * 4
        if each.model in MODELS and each.tokens == fewest_tokens(models, each.model):
            key = MODELS[each.model]
            theirs = [*_published_whole(key), f"{published(key, 'compiling, s'):.1f}"]
        speedup = f"{each.ways['half']['speed_of_all']:.2f}x"
        seconds = digits(each.ways["all"].get("compiling_s", compiling))
        lines.append([each.label, each.us("all"), each.us("half", True), speedup, seconds, *theirs])
    ours = ["one call", "two a layer (calls)", "speedup", "compiling, s"]
    text = markdown(["model", *ours, *(f"published: {name}" for name in ours)], lines)
    why = "Ours has embed and head in it, as calls of their own where a layer has two"
    if compiling:
        why += "; one compiled program serves every model and depth"
    return f"{text}\n\n{why}."


def _published_whole(key: str) -> tuple[str, str, str]:
    """us in one call, us and calls of two a layer, and their ratio."""
    one, two = published(key, "one program, us"), published(key, "two a layer, us")
    return digits(one), f"{two:,.0f} ({PUBLISHED[key].values['calls']})", f"{two / one:.2f}x"


def _layers_table(every: Sequence[Forward]) -> str:
    lines = []
    for each in every:
        for row in (row for row in each.ways.values() if "halves" in row):
            theirs = ["-"] * 3
            if key := PARTS.get((each.model, row["layers"])):
                one, halves, speedup = _published_whole(key)
                whole = published(MODELS[each.model], "two a layer, us")
                of_whole = f"{whole / published(key, 'one program, us'):.2f}x"
                theirs = [f"{one} / {halves}", speedup, of_whole]
            halves = row["halves"]
            lines.append(
                [
                    f"{each.model} 1x{each.tokens}, {row['layers']} layers, {each.variant}",
                    digits(row["ours"]), f"{digits(halves['median'])} ({halves['calls']})",
                    f"{row['speed_against_halves']:.2f}x", f"{row['speed_against_whole']:.2f}x",
                    *theirs,
                ]
            )  # fmt: skip
    header = [
        "us", "one call", "two a layer (calls)", "like for like", "whole model's halves / one call",
        "published: one / two a layer", "published: like for like", "published: whole / one call",
    ]  # fmt: skip
    why = (
        "The published 7.70x for 4 layers divides all 12 layers, two calls each, by 4 in one call; "
        "of the same 4 layers it is 2.57x."
    )
    return f"{markdown(header, lines)}\n\n{why}"


def _depth_table(every: Sequence[Forward]) -> str:
    numbers = sorted({int(way) for each in every for way in each.ways if way.isdigit()})
    depths = ["stage", "half", *map(str, numbers), "all"]
    lines = [
        [
            each.label,
            *(each.us(depth, calls=True) for depth in depths),
            f"{each.ways['stage']['speed_of_all']:.2f}x",
        ]
        for each in every
    ]
    return markdown(["us (calls)", *depths, "stage / all"], lines)


def _peers_table(every: Sequence[Forward]) -> str:
    """For every model the fastest of its depths, however it was launched, next to the peers."""
    fastest: dict[str, tuple[str, Row]] = {}
    for each in every:
        name = f"{each.model} 1x{each.tokens}"
        for depth, row in each.ways.items():
            best = fastest.get(name)
            if "speed_against" in row and (best is None or row["ours"] < best[1]["ours"]):
                fastest[name] = f"{depth}, {each.variant}", row
    peers = list(dict.fromkeys(p for _, row in fastest.values() for p in row["speed_against"]))
    lines = []
    for name, (way, row) in fastest.items():
        cells = [digits(row["peers"].get(peer)) for peer in peers]
        least = min(row["speed_against"].values())
        lines.append([name, f"{digits(row['ours'])} ({way})", *cells, f"{least:.2f}x"])
    return markdown(["us", "fastest depth", *peers, "best of these / fastest"], lines)


def _price_table(rows: Sequence[Row], of: str) -> str:
    return table_of(
        [row for row in rows if row.get(f"price_of_a_{of}")],
        ("us", lambda row: f"{row['model']} 1x{row['tokens']}, {variant(row)}"),
        *median_and_spread(f"a {of}"),
        ("rest", lambda row: digits(row["rest"]["median"])),
    )


def draw(record: Mapping[str, Any]) -> plots.Figure | None:
    """Time against calls, one line a model; a panel for each number of tokens and each variant, of
    several numbers of threads the most. None where no whole model was timed."""
    models = [each for each in forwards(record["rows"]) if each.part == "all"]
    if not models:
        return None
    most = max((row.get("threads", 0) for row in record["rows"] if "depth" in row), default=0)
    shown = sorted({each[1:3] for each in models if not most or each.variant == f"{most} thr."})
    threads = f"{most} threads, " if most else ""
    title = f"A forward by its calls, {threads}{record['device']}"
    figure, all_axes = plots.panels(len(shown), 5, 4.2, title)
    for axes, (tokens, how) in zip(all_axes, shown, strict=True):
        for each in (each for each in models if each[1:3] == (tokens, how)):
            whole = [row for row in each.ways.values() if "speed_of_all" in row]
            points = sorted((row["calls"], row["ours"]) for row in whole)
            axes.plot(*zip(*points, strict=True), "o-", label=each.model)
        title = f"{tokens} token{'s' if tokens > 1 else ''} at once"
        title = title if most else f"{title}, {how}"
        plots.label(axes, "calls a forward", "us a forward", title, log="xy")
    return figure
