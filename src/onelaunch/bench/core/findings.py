"""Findings of a record about the two published studies: pure functions of the record's JSON, so
that a report can be made again without measuring again.

An experiment that answers something published has `findings(record) -> list[Finding]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Verdict = Literal[
    "confirmed", "refuted", "inconclusive", "quick run", "arithmetic", "not applicable"
]
"""What was published holds here; it does not; the figure is too near the bar for this machine's
noise, or the record lacks what it would be compared with; the record is of a quick run; it follows
from other figures and was not measured; the device has nothing of the kind."""
NEEDS_A_MAC = "needs a Mac"
"""How the reason begins where the device that is missing is the study's own."""
PROGRAMS = "ML Program"
"""How a case begins whose seconds are of ML Programs."""
ANSWERS: tuple[Verdict, ...] = ("confirmed", "refuted")
CONFIDENT = 2.0
"""Standard errors between a median and a bar, for it to be on one side of it."""
LEAST_GAIN_SHARE = 0.5
"""The bar of every published speedup's size: so much of its gain, that is speedup less 1. The
device is another one; half says that the effect has its size here, not only its direction."""


def standard_error(spread: Sequence[float] | None, n: int) -> float:
    """About that of a median of n samples, by the distance from their 20th to their 80th
    percentile: 1.683 standard deviations of a normal distribution, whose median scatters 1.253
    times as much as its mean. Of one sample: infinite."""
    if not spread or n < 2:
        return math.inf
    low, high = spread
    return 1.253 / 1.683 * (high - low) / math.sqrt(n)


def below(value: float, bar: float, error: float) -> Verdict:
    """Whether a value with this standard error is below a bar: "inconclusive" where it may be on
    either side of it."""
    if abs(value - bar) < CONFIDENT * error:
        return "inconclusive"
    return "confirmed" if value < bar else "refuted"


def unless(verdict: Verdict) -> str:
    """The end of a reason where `above` or `below` could not decide."""
    return "; too near for this machine's noise" if verdict == "inconclusive" else ""


def above(value: float, bar: float, error: float) -> Verdict:
    """Whether a value with this standard error is above a bar, likewise."""
    return below(-value, -bar, error)


def of_a_gain(speedup: float, published: float, error: float = 0.0) -> tuple[Verdict, str]:
    """The verdict on a speedup's size against a published one's, and why; `error` is its standard
    error."""
    share = (speedup - 1) / (published - 1)
    verdict = above(share, LEAST_GAIN_SHARE, error / (published - 1))
    if share == LEAST_GAIN_SHARE and not error:
        verdict = "confirmed"
    gain = f"{share:.0%} of the published gain" if share > 0 else "no gain"
    return verdict, f"{gain}; at least {LEAST_GAIN_SHARE:.0%} is confirmed{unless(verdict)}"


def error_of_ratio(ratio: float, *measured: Mapping[str, Any]) -> float:
    """The standard error of a ratio of rows' medians, of independent ones."""
    return ratio * math.hypot(
        *(standard_error(row.get("spread"), row.get("n", 0)) / row["ours"] for row in measured)
    )


@dataclass(frozen=True)
class Finding:
    """One published statement and what one record answers.

    `answers` are the keys of published.py that it answers; `claim` the statement in a few words;
    `published` and `ours` the figures with their units, as they are to be read, `ours` empty where
    there is none; `ratio` ours over the published one where both are of the same kind, None
    otherwise; `why` the verdict in one line.
    """

    answers: tuple[str, ...]
    claim: str
    published: str
    ours: str
    verdict: Verdict
    why: str
    ratio: float | None = None


def needs_a_mac(why: str) -> tuple[Verdict, str]:
    """The finding where only the study's own kind of device can answer: Apple's parser, compiler,
    Neural Engine, and their seconds."""
    return "not applicable", f"{NEEDS_A_MAC}: {why}"


def without_evaluated_seconds(findings: Iterable[Finding]) -> list[Finding]:
    """Findings without a verdict on ML Programs: their seconds here are those of an evaluator,
    PyTorch operation by operation in the place of a Neural Engine. The figures stay."""
    verdict, why = needs_a_mac("these seconds are of an evaluator, PyTorch operation by operation")
    return [
        replace(each, verdict=verdict, why=why, ratio=None)
        if each.claim.startswith(PROGRAMS)
        else each
        for each in findings
    ]
