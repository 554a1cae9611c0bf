"""What a record says about the two published studies: pure functions of the record's JSON, so that
a report can be made again without measuring again.

An experiment that answers something published has `findings(record) -> list[Finding]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["confirmed", "refuted", "not applicable"]


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
