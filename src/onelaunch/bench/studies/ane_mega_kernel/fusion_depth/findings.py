"""What the record of fusion-depth says about the published figures of fused layers.

A published speedup is of two forms of the same work. Here it is held against the same two forms:
on a GPU launched from Python one by one and replayed as a graph, each with a finding of its own; on
a CPU with the most threads. What a call costs is the device's: fewer calls save what calls cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onelaunch.bench.core.findings import Finding, above, error_of_ratio, of_a_gain, unless
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import figure as digits
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import Ways, by_case

LEAST_PRICE_SHARE = 0.5
"""Of the published price of a call, likewise."""
FFNS = {
    "ffn-64": ("64/128", 1), "ffn-128": ("128/256", 1), "ffn-288": ("288/768", 1),
    "ffn-288-128": ("288/768", 128), "ffn-768": ("768/2048", 1),
}  # fmt: skip
MODELS = {"whole-15m": "stories15m", "whole-110m": "stories110m"}
PARTS = {"part-110m-4": 4, "part-110m-8": 8}
PARTS_OF, SWEET_SPOT = "stories110m", 4
_UNTOLD = "; of how many tokens the published figure is was not told"
PRICED = ("64/128", 1)
"""Where a call's price stands out most: the smallest layers."""


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of every published figure that the record has a counterpart of, for each way of calling."""
    cases = by_case(record["rows"])
    most = max((row["threads"] for row in record["rows"] if "threads" in row), default=None)
    if most is not None:
        cases = {key: ways for key, ways in cases.items() if key[2] == f"{most} thr."}
    found: list[Finding] = []
    for (model, tokens, variant), ways in cases.items():
        for key, of in FFNS.items():
            if of == (model, tokens):
                found += _ffn(key, ways, variant)
        if tokens > min(n for name, n, _ in cases if name == model):
            continue  # as few as there are: what calls cost is seen there
        for key, name in MODELS.items():
            if name == model:
                found += _whole(key, ways, variant)
        if model == PARTS_OF:
            found += _parts(ways, variant)
            found += _sweet_spot(ways, variant)
    return found + list(_prices(record, most))


def _both(
    key: str, claim: str, size: str, told: tuple[str, str], ours: float, error: float, more: str
) -> Iterator[Finding]:
    """A speedup's direction and its size, which are two claims: 1.05x is faster, and little."""
    published = float(PUBLISHED[key].values["speedup"])
    direction = above(ours, 1.0, error)
    yield Finding(
        (key,), claim, *told, direction,
        f"more than 1x is confirmed{unless(direction)}{more}", ours / published,
    )  # fmt: skip
    verdict, why = of_a_gain(ours, published, error)
    yield Finding((key,), size, *told, verdict, f"{why}{more}", ours / published)


def _ffn(key: str, ways: Ways, variant: str) -> Iterator[Finding]:
    values = PUBLISHED[key].values
    published, ours = float(values["speedup"]), float(ways["1"]["speed_of_all"])
    layers = f"12 feed-forward layers of {PUBLISHED[key].row}"
    how = f"{_tokens(ways)}, {variant}"
    return _both(
        key,
        f"{layers} are faster in one call, {how}",
        f"{layers}, in one call over 12: the size of the speedup, {how}",
        (
            f"{published:g}x ({values['12 apart, us']:,} us in 12, {values['12 in one, us']:,} in "
            "one)",
            f"{ours:.2f}x ({digits(ways['1']['ours'])} us in 12, {digits(ways['all']['ours'])} in "
            "one)",
        ),
        ours,
        error_of_ratio(ours, ways["1"], ways["all"]),
        f"{_UNTOLD if key != 'ffn-288-128' else ''}; {_called(variant)}",
    )


def _whole(key: str, ways: Ways, variant: str) -> Iterator[Finding]:
    values = PUBLISHED[key].values
    half, whole = ways["half"], ways["all"]
    published, ours = float(values["speedup"]), float(half["speed_of_all"])
    return _both(
        key,
        f"{PUBLISHED[key].row}: one call is faster than two a layer, {variant}",
        f"{PUBLISHED[key].row}, in one call over two a layer: the size of the speedup, {variant}",
        (
            f"{published:.2f}x ({values['calls']} calls)",
            f"{ours:.2f}x ({half['calls']} calls in {digits(half['ours'])} us, one in "
            f"{digits(whole['ours'])})",
        ),
        ours,
        error_of_ratio(ours, half, whole),
        f"; {_tokens(ways)}, embed and head counted; {_called(variant)}",
    )


def _parts(ways: Ways, variant: str) -> Iterator[Finding]:
    for key, layers in PARTS.items():
        row = ways.get(f"first {layers} layers", {})
        if "speed_against_halves" not in row:
            continue
        published, ours = float(PUBLISHED[key].values["speedup"]), row["speed_against_halves"]
        first = f"the first {layers} layers of {PARTS_OF}"
        yield from _both(
            key,
            f"{first} are faster in one call, {variant}",
            f"{first}, in one call over two a layer: the size of the speedup, {variant}",
            (
                f"{published:g}x ({PUBLISHED[key].values['calls']} calls)",
                f"{ours:.2f}x ({row['halves']['calls']} calls)",
            ),
            ours,
            error_of_ratio(ours, row),
            f"; of the same layers; {_called(variant)}",
        )


def _sweet_spot(ways: Ways, variant: str) -> Iterator[Finding]:
    """4 layers a call, of a whole forward: like for like with two calls a layer, and with one
    call."""
    row = ways.get(str(SWEET_SPOT))
    if row is None:
        return
    published = float(PUBLISHED["sweet-spot"].values["speedup"])
    halves, whole = ways["half"]["ours"], ways["all"]["ours"]
    ours = halves / row["ours"]
    verdict, why = of_a_gain(ours, published, error_of_ratio(ours, ways["half"], row))
    first = ways.get(f"first {SWEET_SPOT} layers", {})
    as_divided = (
        f"divided as published, all layers by halves over {SWEET_SPOT} in one call, "
        f"{first['speed_against_whole']:.2f}x; "
        if "speed_against_whole" in first
        else ""
    )
    yield Finding(
        ("sweet-spot",),
        f"{SWEET_SPOT} layers a call are a sweet spot of {PARTS_OF}, {variant}",
        f"{published:.2f}x of two calls a layer",
        f"{ours:.2f}x of two calls a layer; one call for all {halves / whole:.2f}x",
        verdict,
        f"{why}; {as_divided}the published ratio divides 12 layers by 4, like for like 2.57x",
        ours / published,
    )


def _prices(record: dict[str, Any], most: int | None) -> Iterator[Finding]:
    published = float(PUBLISHED["call-price"].values["us"])
    for row in record["rows"]:
        if not row.get("price_of_a_call") or (row["model"], row["tokens"]) != PRICED:
            continue
        if most is not None and row["threads"] != most:
            continue
        variant = row.get("launched") or f"{most} thr."
        low, high = row["spread"]
        share = row["ours"] / published
        yield Finding(
            ("call-price",),
            f"a call has a price beside the arithmetic, {variant}",
            f"about {published:g} us",
            f"{digits(row['ours'])} us ({digits(low)} to {digits(high)})",
            "confirmed" if share >= LEAST_PRICE_SHARE and low > 0 else "refuted",
            f"{'there, at' if low > 0 else 'not told from 0, at'} {share:.1%} of the published "
            f"price; {_called(variant)}",
            share,
        )


def _tokens(ways: Ways) -> str:
    tokens = ways["all"]["tokens"]
    return f"{tokens} token{'s' if tokens > 1 else ''}"


def _called(variant: str) -> str:
    return {
        "one by one": "launched from Python, one after another",
        "graph": "launches replayed as a CUDA graph",
    }.get(variant, f"calls of compiled code on a CPU, {variant.removesuffix(' thr.')} threads")
