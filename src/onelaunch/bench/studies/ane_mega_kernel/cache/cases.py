"""What cache does with a store, on the CPU and on a GPU, by the names in its record; and the
study's claims about it."""

from __future__ import annotations

from onelaunch.bench.core.findings import Finding, Verdict
from onelaunch.bench.core.published import PUBLISHED

MODEL = "stories15m"
HIT, MISS = "hit", "miss"
EMPTY, SAME, ASKED = "nothing kept", "kept, same process", "asked whether it is kept"
OTHER, UPDATED = "kept, another process", "after an update of the weights"
OTHER_UPDATED = "after an update, another process"
AT_ONCE, DAMAGED, REPAIRED = "two processes at once", "a damaged entry", "after the damaged entry"

CLAIMS = {
    "cache-key": "a program is kept by hashes of program, options and weights",
    "cache-exists": "the store says whether a program is kept, without reading it",
    "cache-weight-free": "one without weights is a hit in another process",
    "cache-weights": "one with weights is a miss after an update",
}


def finding(key: str, ours: str, as_expected: bool | None, why: str) -> Finding:
    """Of one claim; None where the device has nothing of the kind."""
    verdict: Verdict = "confirmed" if as_expected else "refuted"
    if as_expected is None:
        verdict = "not applicable"
    return Finding((key,), CLAIMS[key], str(PUBLISHED[key].values["told"]), ours, verdict, why)
