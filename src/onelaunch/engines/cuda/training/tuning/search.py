"""The walk through the forms of a training step, without a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median, quantiles
from typing import Any, NamedTuple

from onelaunch.engines.cuda.training.forms import AttentionBlocks, ProductTile, TrainingForms
from onelaunch.engines.cuda.training.tuning.candidates import Candidates
from onelaunch.errors import RunFailed

MARGIN = 0.01
"""A candidate has to be faster by more than that, beyond the noise of its own timing."""
TIMING = "timing training steps"
"""The phase that `progress` hears of."""

Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and of how much."""


class Comparison(NamedTuple):
    """Medians of a micro-step in the best forms so far and in a candidate's, in microseconds; how
    much faster the candidate is, as a fraction, and how far that varies."""

    best_us: float
    us: float
    gain: float
    noise: float

    @property
    def wins(self) -> bool:
        """Whether the candidate takes the place of the best."""
        return self.gain > MARGIN + self.noise


Compare = Callable[[TrainingForms, TrainingForms], Comparison | str]
"""Compare the best forms so far with a candidate; returns why the candidate does not run."""


class Timed(NamedTuple):
    """A value of one form. `us` is None for one that does not run, and `why` the reason."""

    form: str
    value: Any
    us: float | None
    why: str | None = None


class Found(NamedTuple):
    """The fastest forms; microseconds in them and in the rule's, timed in turn at the end; all
    values that were timed."""

    forms: TrainingForms
    us: float
    rule_us: float
    timed: list[Timed]


def comparison_of(pairs: Sequence[tuple[float, float]]) -> Comparison:
    """From microseconds of the best and of a candidate, timed in turn, two pairs at least. The
    noise is half the distance of the quartiles of their ratios."""
    ratios = [us / best_us for best_us, us in pairs]
    lower, _, upper = quantiles(ratios, n=4, method="inclusive")
    best_us, us = (median(each) for each in zip(*pairs, strict=True))
    return Comparison(best_us, us, 1 - median(ratios), (upper - lower) / 2)


def search(
    by_rule: TrainingForms, candidates: Candidates, compare: Compare, progress: Progress
) -> Found:
    """Change one form at a time, from the rule's on, to the fastest of its candidates. Where the
    forms that this finds are not faster than the rule's in the end, the rule's are the answer.
    Raises RunFailed where the rule's do not run."""
    best, timed = by_rule, list[Timed]()
    done, total = 0, 1 + sum(len(values) - 1 for values in candidates.values())
    for form, values in candidates.items():
        start, start_us, tried = getattr(best, form), None, list[Timed]()
        for value in values:
            if value == start:
                continue
            candidate = replace(best, **{form: value})
            result = compare(best, candidate)
            if isinstance(result, str):
                tried.append(Timed(form, value, None, result))
            else:
                start_us = start_us or result.best_us
                tried.append(Timed(form, value, result.us))
                best = candidate if result.wins else best
            done += 1
            progress(TIMING, done, total)
        timed += [Timed(form, start, start_us), *tried] if start_us else tried
    last = compare(by_rule, best)
    progress(TIMING, total, total)
    if isinstance(last, str):
        raise RunFailed(f"the forms that were found do not run again: {last}")
    if last.wins:
        return Found(best, last.us, last.best_us, timed)
    return Found(by_rule, last.best_us, last.best_us, timed)


def shown(value: Any) -> str:
    """A form's value in a few characters."""
    if value is None:
        return "library"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, AttentionBlocks):
        return f"{value.rows}x{value.columns}, {_pipeline(value)}"
    if isinstance(value, ProductTile):
        return f"{value.block_m}x{value.block_f}x{value.block_k}, {_pipeline(value)}"
    return f"{value:,}"


def _pipeline(value: AttentionBlocks | ProductTile) -> str:
    return f"{value.num_stages} stages, {value.num_warps} warps"
