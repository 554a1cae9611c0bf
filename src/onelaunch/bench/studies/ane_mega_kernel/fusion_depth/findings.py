"""Findings of fusion-depth about the published figures of fused layers.

A published speedup is of one call over separate calls. On a CPU both are calls of one compiled
program. On a GPU separate calls are one kernel per stage, launched from Python or replayed as a
graph: not the kernel that holds all stages launched once for each, which costs three times as much
from Python and which no user would choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from onelaunch.bench.core.views import published
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import (
    FFNS,
    MODELS,
    PARTS,
    Forward,
    fewest_tokens,
    forwards,
    variant,
)

PARTS_OF, SWEET_SPOT = "stories110m", 4
PROXY, PROXY_OF = "288/768", "stories15m"
"""A feed-forward alone, and the model that it is from."""
PRICED = ("64/128", 1)
"""Where a call's price stands out most: the smallest layers."""
STAGED = {"one by one": "staged", "graph": "staged + graph"}
"""By how a GPU's kernels are launched, the peer that has one for each stage."""
CALLED = {
    "one by one": "kernels launched from Python, one after another",
    "graph": "kernels replayed as a CUDA graph",
}


def findings(record: dict[str, Any]) -> list[Finding]:
    """A finding for every published figure that the record has a counterpart of, for each way of
    calling."""
    every = forwards(record["rows"])
    threads = [row["threads"] for row in record["rows"] if "threads" in row]
    if threads:
        every = [each for each in every if each.variant == f"{max(threads)} thr."]
    results: list[Finding] = []
    for each in every:
        if key := FFNS.get((each.model, each.tokens)):
            results += _ffn(key, each)
        if each.tokens > fewest_tokens(every, each.model):
            continue
        if key := MODELS.get(each.model):
            results += _whole(key, each)
        if each.model == PROXY_OF:
            results += _over_ffn(each, every)
        if each.model == PARTS_OF:
            results += _parts(each)
            results += _sweet_spot(each)
    return results + list(_prices(record, every))


class Speedup(NamedTuple):
    """One call over separate ones: the ratio, its standard error, and in words what both are."""

    ratio: float
    error: float
    us: str


def _speedup(each: Forward, separate: str, way: str = "all") -> Speedup:
    """The speedup of `way` over separate calls: on a CPU the way of that name, on a GPU one kernel
    per stage. The record has no spread of a GPU's peers: the error is that of `way` alone."""
    one = each.ways[way]
    in_one = f"{digits(one['ours'])} in {'one' if one['calls'] == 1 else one['calls']}"
    if peer := STAGED.get(each.variant):
        ratio = float(one["speed_against"][peer])
        us = f"{digits(one['peers'][peer])} us by one kernel per stage, {in_one}"
        return Speedup(ratio, error_of_ratio(ratio, one), us)
    several = each.ways[separate]
    ratio = several["ours"] / one["ours"] if way != "all" else float(several["speed_of_all"])
    us = f"{digits(several['ours'])} us in {several['calls']}, {in_one}"
    return Speedup(ratio, error_of_ratio(ratio, several, one), us)


def _both(
    key: str, what: str, each: Forward, times: str, separate: str, more: str
) -> list[Finding]:
    """A speedup's direction and its size, which are two claims: 1.05x is faster, and little."""
    theirs, ours = published(key, "speedup"), _speedup(each, separate)
    direction = above(ours.ratio, 1.0, ours.error)
    size, share = of_a_gain(ours.ratio, theirs, ours.error)
    figures = f"{theirs:g}x ({times})", f"{ours.ratio:.2f}x ({ours.us})"
    why = f"more than 1x is confirmed{unless(direction)}"
    more = f"{more}; {_called(each)}"
    return [
        Finding((key,), claim, *figures, verdict, f"{reason}{more}", ours.ratio / theirs)
        for claim, verdict, reason in (
            (f"{what} in one call: faster than separate calls, {each.variant}", direction, why),
            (f"{what} in one call: the size of the speedup, {each.variant}", size, share),
        )
    ]


def _ffn(key: str, each: Forward) -> list[Finding]:
    values = PUBLISHED[key].values
    what = f"12 feed-forward layers of {PUBLISHED[key].row}, {_tokens(each)},"
    times = f"{values['12 apart, us']:,} us in 12, {values['12 in one, us']:,} in one"
    unknown = "; the study does not say how many tokens its figure is of"
    return _both(key, what, each, times, "1", unknown if key != "ffn-288-128" else "")


def _whole(key: str, each: Forward) -> list[Finding]:
    values = PUBLISHED[key].values
    times = f"{values['two a layer, us']:,} us in {values['calls']}, "
    times += f"{values['one program, us']:,} in one"
    more = f"; {_tokens(each)}, embed and head counted"
    return _both(key, f"{PUBLISHED[key].row},", each, times, "half", more)


def _over_ffn(each: Forward, every: Sequence[Forward]) -> Iterator[Finding]:
    """Whether whole layers gain more from one call than their feed-forward alone."""
    proxies = [e for e in every if (e.model, e.variant) == (PROXY, each.variant)]
    if not proxies:
        return
    near = min(proxies, key=lambda proxy: abs(proxy.tokens - each.tokens))
    whole, proxy = _speedup(each, "half"), _speedup(near, "1")
    ratio = whole.ratio / proxy.ratio
    error = ratio * ((whole.error / whole.ratio) ** 2 + (proxy.error / proxy.ratio) ** 2) ** 0.5
    verdict = above(ratio, 1.0, error)
    names = "whole, speedup", "feed-forward, speedup"
    their_whole, their_proxy = (published("whole-over-ffn", name) for name in names)
    yield Finding(
        ("whole-over-ffn",),
        f"whole layers gain more from one call than their feed-forward alone, {each.variant}",
        f"{their_whole:g}x over {their_proxy:g}x",
        f"{whole.ratio:.2f}x over {proxy.ratio:.2f}x",
        verdict,
        f"stories15m, {_tokens(each)}, over 12 layers of {PROXY} on {near.tokens}; "
        f"{_called(each)}{unless(verdict)}",
        ratio * their_proxy / their_whole,
    )


def _parts(each: Forward) -> Iterator[Finding]:
    for (_, layers), key in PARTS.items():
        row = each.ways.get(f"first {layers} layers", {})
        if "speed_against_halves" not in row:
            continue
        values = PUBLISHED[key].values
        yield Finding(
            (key,),
            f"the first {layers} layers of {PARTS_OF} in one call, {each.variant}",
            f"{values['speedup']:g}x ({values['calls']} calls)",
            f"{row['speed_against_halves']:.2f}x ({row['halves']['calls']} launches of the same "
            "kernel)",
            "inconclusive",
            "one kernel per stage was not timed of the first layers alone, and a kernel that holds "
            "all stages, launched for each half of a layer, is not what one call replaces",
        )


def _sweet_spot(each: Forward) -> Iterator[Finding]:
    """4 layers a call, of a whole forward, like for like: of the same layers."""
    if str(SWEET_SPOT) not in each.ways:
        return
    theirs, divided = published("part-110m-4", "speedup"), published("sweet-spot", "speedup")
    ours, whole = _speedup(each, "half", str(SWEET_SPOT)), _speedup(each, "half")
    verdict, why = of_a_gain(ours.ratio, theirs, ours.error)
    yield Finding(
        ("sweet-spot",),
        f"{SWEET_SPOT} layers a call are a sweet spot of {PARTS_OF}, {each.variant}",
        f"{divided:.2f}x, which divides 12 layers by 4; like for like {theirs:g}x",
        f"{ours.ratio:.2f}x ({ours.us}); one call for all {whole.ratio:.2f}x",
        verdict,
        f"{why}, like for like; {_called(each)}",
        ours.ratio / theirs,
    )


def _prices(record: dict[str, Any], every: Sequence[Forward]) -> Iterator[Finding]:
    """Whether a call has a price; how large it is depends on its device."""
    theirs = f"about {published('call-price', 'us'):g} us"
    by_variant = {each.variant: each for each in every if each[:2] == PRICED}
    for row in record["rows"]:
        if not row.get("price_of_a_call") or (row["model"], row["tokens"]) != PRICED:
            continue
        each = by_variant.get(variant(row))
        if each is None:
            continue
        low, high = row["spread"]
        ours, how = f"{digits(row['ours'])} us ({digits(low)} to {digits(high)})", _called(each)
        if each.variant == "one by one":
            peers, kernels = each.ways["all"]["peers"], each.ways["stage"]["calls"] + 1  # embed's
            low = (peers["staged"] - peers["staged + graph"]) / kernels
            ours = f"{digits(low)} us"
            how = f"what launching {kernels} kernels from Python takes over replaying them"
        yield Finding(
            ("call-price",), f"a call has a price besides the arithmetic, {each.variant}", theirs,
            ours, "confirmed" if low > 0 else "inconclusive", how,
        )  # fmt: skip
        yield Finding(
            ("call-price",), f"the size of a call's price, {each.variant}", theirs, ours,
            *needs_a_mac("it is of a call to Apple's service, from another process"),
        )  # fmt: skip


def _tokens(each: Forward) -> str:
    return f"{each.tokens} token{'s' if each.tokens > 1 else ''}"


def _called(each: Forward) -> str:
    threads = each.variant.removesuffix(" thr.")
    return CALLED.get(each.variant, f"calls of compiled code on a CPU, {threads} threads")
