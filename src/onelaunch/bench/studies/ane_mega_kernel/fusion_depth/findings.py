"""What the record of fusion-depth says about the published figures of fused layers.

A published speedup is of one call over separate calls. On a CPU both are calls of one compiled
program. On a GPU separate calls are one kernel per stage, launched from Python or replayed as a
graph: not the kernel that holds all stages launched once for each, which costs three times as much
from Python and is nobody's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from onelaunch.bench.core.findings import (
    Finding,
    above,
    error_of_ratio,
    needs_a_mac,
    of_a_gain,
    unless,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import (
    FFNS,
    MODELS,
    PARTS,
    Key,
    Ways,
    by_case,
)

PARTS_OF, SWEET_SPOT = "stories110m", 4
PROXY, PROXY_OF = "288/768", "stories15m"
"""A feed-forward alone, and the model whose it is."""
PRICED = ("64/128", 1)
"""Where a call's price stands out most: the smallest layers."""
STAGED = {"one by one": "staged", "graph": "staged + graph"}
"""By how a GPU's kernels are launched, the peer that has one for each stage."""
UNTOLD = "; of how many tokens the published figure is was not told"


class Speedup(NamedTuple):
    """One call over separate ones: the ratio, its standard error, and in words what both are."""

    ratio: float
    error: float
    us: str


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of every published figure that the record has a counterpart of, for each way of calling."""
    cases = by_case(record["rows"])
    most = max((row["threads"] for row in record["rows"] if "threads" in row), default=None)
    if most is not None:
        cases = {key: ways for key, ways in cases.items() if key[2] == f"{most} thr."}
    found: list[Finding] = []
    for (model, tokens, variant), ways in cases.items():
        if key := FFNS.get((model, tokens)):
            found += _ffn(key, ways, variant)
        if tokens > min(n for name, n, _ in cases if name == model):
            continue  # as few as there are: what calls cost is seen there
        if key := MODELS.get(model):
            found += _whole(key, ways, variant)
        if model == PROXY_OF:
            found += _beside_ffn(ways, tokens, variant, cases)
        if model == PARTS_OF:
            found += _parts(ways, variant)
            found += _sweet_spot(ways, variant)
    return found + list(_prices(record, cases))


def speedup(ways: Ways, separate: str, way: str, variant: str) -> Speedup:
    """Of `way` over separate calls: on a CPU the way of that name, on a GPU one kernel per stage.
    The record has no spread of a GPU's peers: the error is that of `way` alone."""
    one = ways[way]
    if peer := STAGED.get(variant):
        us = f"{digits(one['peers'][peer])} us by one kernel per stage, {digits(one['ours'])} in "
        us += _many(one["calls"])
        ratio = float(one["speed_against"][peer])
        return Speedup(ratio, error_of_ratio(ratio, one), us)
    several = ways[separate]
    ratio = several["ours"] / one["ours"] if way != "all" else float(several["speed_of_all"])
    us = f"{digits(several['ours'])} us in {several['calls']}, {digits(one['ours'])} in "
    us += _many(one["calls"])
    return Speedup(ratio, error_of_ratio(ratio, several, one), us)


def _both(key: str, what: str, variant: str, told: str, ours: Speedup, more: str) -> list[Finding]:
    """A speedup's direction and its size, which are two claims: 1.05x is faster, and little."""
    published = float(PUBLISHED[key].values["speedup"])
    direction = above(ours.ratio, 1.0, ours.error)
    size, share = of_a_gain(ours.ratio, published, ours.error)
    figures = f"{published:g}x ({told})", f"{ours.ratio:.2f}x ({ours.us})"
    why = f"more than 1x is confirmed{unless(direction)}"
    more = f"{more}; {_called(variant)}"
    return [
        Finding((key,), claim, *figures, verdict, f"{reason}{more}", ours.ratio / published)
        for claim, verdict, reason in (
            (f"{what} in one call: faster than separate calls, {variant}", direction, why),
            (f"{what} in one call: the size of the speedup, {variant}", size, share),
        )
    ]


def _ffn(key: str, ways: Ways, variant: str) -> list[Finding]:
    values, tokens = PUBLISHED[key].values, _tokens(ways)
    return _both(
        key,
        f"12 feed-forward layers of {PUBLISHED[key].row}, {tokens},",
        variant,
        f"{values['12 apart, us']:,} us in 12, {values['12 in one, us']:,} in one",
        speedup(ways, "1", "all", variant),
        UNTOLD if key != "ffn-288-128" else "",
    )


def _whole(key: str, ways: Ways, variant: str) -> list[Finding]:
    values = PUBLISHED[key].values
    return _both(
        key,
        f"{PUBLISHED[key].row},",
        variant,
        f"{values['two a layer, us']:,} us in {values['calls']}, {values['one program, us']:,} in "
        "one",
        speedup(ways, "half", "all", variant),
        f"; {_tokens(ways)}, embed and head counted",
    )


def _beside_ffn(ways: Ways, tokens: int, variant: str, cases: dict[Key, Ways]) -> Iterator[Finding]:
    """Whether whole layers gain more from one call than their feed-forward alone."""
    proxies = [n for model, n, how in cases if (model, how) == (PROXY, variant)]
    if not proxies:
        return
    near = min(proxies, key=lambda n: abs(n - tokens))
    whole = speedup(ways, "half", "all", variant)
    proxy = speedup(cases[PROXY, near, variant], "1", "all", variant)
    ratio = whole.ratio / proxy.ratio
    error = ratio * ((whole.error / whole.ratio) ** 2 + (proxy.error / proxy.ratio) ** 2) ** 0.5
    verdict = above(ratio, 1.0, error)
    values = PUBLISHED["whole-over-ffn"].values
    yield Finding(
        ("whole-over-ffn",),
        f"whole layers gain more from one call than their feed-forward alone, {variant}",
        f"{values['whole, speedup']:g}x over {values['feed-forward, speedup']:g}x",
        f"{whole.ratio:.2f}x over {proxy.ratio:.2f}x",
        verdict,
        f"stories15m, {_tokens(ways)}, over 12 layers of {PROXY} on {near}; "
        f"{_called(variant)}{unless(verdict)}",
        ratio * float(values["feed-forward, speedup"]) / float(values["whole, speedup"]),
    )


def _parts(ways: Ways, variant: str) -> Iterator[Finding]:
    for (_, layers), key in PARTS.items():
        row = ways.get(f"first {layers} layers", {})
        if "speed_against_halves" not in row:
            continue
        values = PUBLISHED[key].values
        yield Finding(
            (key,),
            f"the first {layers} layers of {PARTS_OF} in one call, {variant}",
            f"{values['speedup']:g}x ({values['calls']} calls)",
            f"{row['speed_against_halves']:.2f}x ({row['halves']['calls']} launches of the same "
            "kernel)",
            "inconclusive",
            "one kernel per stage was not timed of the first layers alone, and a kernel that holds "
            "all stages, launched for each half of a layer, is not what one call replaces",
        )


def _sweet_spot(ways: Ways, variant: str) -> Iterator[Finding]:
    """4 layers a call, of a whole forward, like for like: of the same layers."""
    if str(SWEET_SPOT) not in ways:
        return
    published = float(PUBLISHED["part-110m-4"].values["speedup"])
    ours, whole = (speedup(ways, "half", way, variant) for way in (str(SWEET_SPOT), "all"))
    verdict, why = of_a_gain(ours.ratio, published, ours.error)
    divided = float(PUBLISHED["sweet-spot"].values["speedup"])
    yield Finding(
        ("sweet-spot",),
        f"{SWEET_SPOT} layers a call are a sweet spot of {PARTS_OF}, {variant}",
        f"{divided:.2f}x, which divides 12 layers by 4; like for like {published:g}x",
        f"{ours.ratio:.2f}x ({ours.us}); one call for all {whole.ratio:.2f}x",
        verdict,
        f"{why}, like for like; {_called(variant)}",
        ours.ratio / published,
    )


def _prices(record: dict[str, Any], cases: dict[Key, Ways]) -> Iterator[Finding]:
    """Whether a call has a price; how large it is is its device's affair."""
    published = f"about {PUBLISHED['call-price'].values['us']:g} us"
    for row in record["rows"]:
        if not row.get("price_of_a_call") or (row["model"], row["tokens"]) != PRICED:
            continue
        variant = row["launched"] if "launched" in row else f"{row['threads']} thr."
        ways = cases.get((*PRICED, variant))
        if ways is None:
            continue
        low, high = row["spread"]
        price, ours = row["ours"], f"{digits(row['ours'])} us ({digits(low)} to {digits(high)})"
        how = _called(variant)
        if variant == "one by one":
            peers, kernels = ways["all"]["peers"], ways["stage"]["calls"] + 1  # embed's own
            price = low = (peers["staged"] - peers["staged + graph"]) / kernels
            ours = f"{digits(price)} us"
            how = f"what launching {kernels} kernels from Python takes over replaying them"
        yield Finding(
            ("call-price",), f"a call has a price beside the arithmetic, {variant}", published,
            ours, "confirmed" if low > 0 else "inconclusive", how,
        )  # fmt: skip
        yield Finding(
            ("call-price",), f"the size of a call's price, {variant}", published, ours,
            *needs_a_mac("it is of a call to Apple's service, from another process"),
        )  # fmt: skip


def _many(calls: int) -> str:
    return "one" if calls == 1 else f"{calls}"


def _tokens(ways: Ways) -> str:
    tokens = ways["all"]["tokens"]
    return f"{tokens} token{'s' if tokens > 1 else ''}"


def _called(variant: str) -> str:
    return {
        "one by one": "kernels launched from Python, one after another",
        "graph": "kernels replayed as a CUDA graph",
    }.get(variant, f"calls of compiled code on a CPU, {variant.removesuffix(' thr.')} threads")
