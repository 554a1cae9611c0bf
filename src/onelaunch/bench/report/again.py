"""Whether a second run of the same experiments finds the same: its verdicts beside the first's,
statement by statement. Figures of different runs are not compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onelaunch.bench.core.findings import ANSWERS, Finding
from onelaunch.bench.report.gather import Part, Report

AGAIN_TITLE = "A second run"
AGAIN_HEADER = ("experiment", "device", "statements", "the same verdict", "another", "in one run")
DIFFERING_HEADER = ("claim", "device", "first run", "verdict", "second run", "verdict")


@dataclass(frozen=True)
class Repeated:
    """The findings of an experiment in two runs on a device: those of both, and how many only one
    run has."""

    experiment: str
    device: str
    pairs: tuple[tuple[Finding, Finding], ...]
    alone: int

    @property
    def differing(self) -> list[tuple[Finding, Finding]]:
        return [(one, other) for one, other in self.pairs if one.verdict != other.verdict]


def repeated(report: Report) -> list[Repeated]:
    """Of every experiment that has findings in both runs on a device, in the report's order."""
    second = {(part.experiment, part.device): part for part in report.again}
    return [
        _repeated(part, second[part.experiment, part.device])
        for part in report.parts
        if part.findings and (part.experiment, part.device) in second
    ]


def _repeated(one: Part, other: Part) -> Repeated:
    theirs = {(each.answers, each.claim): each for each in other.findings}
    pairs = tuple(
        (each, theirs[each.answers, each.claim])
        for each in one.findings
        if (each.answers, each.claim) in theirs
    )
    alone = len(one.findings) + len(other.findings) - 2 * len(pairs)
    return Repeated(one.experiment, one.device, pairs, alone)


def again_summary(found: list[Repeated]) -> str:
    """In a sentence."""
    pairs = sum(len(each.pairs) for each in found)
    other = sum(len(each.differing) for each in found)
    opposite = sum(
        one.verdict in ANSWERS and second.verdict in ANSWERS
        for each in found
        for one, second in each.differing
    )
    count = "1 record was" if len(found) == 1 else f"{len(found)} records were"
    return (
        f"{count} made a second time, by a run of its own: of {pairs} statements "
        f"{pairs - other} have the same verdict again, {other} another, {opposite} of these the "
        "opposite one; the others are inconclusive in one of the runs: too near a bar."
    )


def again_lines(found: list[Repeated]) -> list[tuple[str, list[str]]]:
    """Device and cells of every experiment."""
    return [
        (
            each.device,
            [
                each.experiment, each.device, str(len(each.pairs)),
                str(len(each.pairs) - len(each.differing)), str(len(each.differing)),
                str(each.alone),
            ],
        )
        for each in found
    ]  # fmt: skip


def differing_lines(found: list[Repeated]) -> Iterator[tuple[str, list[str]]]:
    """Device and cells of every statement whose verdict changed."""
    for each in found:
        for one, other in each.differing:
            yield (
                each.device,
                [one.claim, each.device, one.ours, one.verdict, other.ours, other.verdict],
            )
