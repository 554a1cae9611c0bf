"""What a record says about the two published studies: pure functions of the record's JSON, so that
a report can be made again without measuring again.

An experiment that answers something published has `findings(record) -> list[Finding]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["confirmed", "refuted", "not applicable"]
CONFIDENT = 2.0
"""Standard errors between a median and a bar, for it to be on one side of it."""


def standard_error(spread: Sequence[float] | None, n: int) -> float:
    """About that of a median of n samples, by the distance from their 20th to their 80th
    percentile: 1.683 standard deviations of a normal distribution, whose median scatters 1.253
    times as much as its mean. Of one sample nothing is known: infinite."""
    if not spread or n < 2:
        return math.inf
    low, high = spread
    return 1.253 / 1.683 * (high - low) / math.sqrt(n)


def below(value: float, bar: float, error: float) -> Verdict:
    """Whether a value with this standard error is below a bar: "not applicable" where it may be on
    either side of it."""
    if abs(value - bar) < CONFIDENT * error:
        return "not applicable"
    return "confirmed" if value < bar else "refuted"


def unless(verdict: Verdict) -> str:
    """What is to be said where `above` or `below` gave no verdict."""
    return "; too near for this machine's noise" if verdict == "not applicable" else ""


def above(value: float, bar: float, error: float) -> Verdict:
    """The like, above it."""
    return below(-value, -bar, error)


@dataclass(frozen=True)
class Finding:
    """One published statement held against one record.

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
