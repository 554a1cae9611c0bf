"""The report's beginning: what the two studies claimed, what holds on which device, and the three
plots that show it. Made of the records' findings, so that it is of whatever records there are.

A claim has the published rows that it is about. Of each device the story says which of its
statements hold, with the figures of the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import NEEDS_A_MAC, Finding
from onelaunch.bench.core.published import PUBLISHED, Study
from onelaunch.bench.report.gather import Report

STORY_TITLE = "What was claimed, and what holds"
INTRODUCTION = (
    "Small transformers wait for calls more than for arithmetic. One study put all layers of a "
    "model into one program of Apple's Neural Engine, and hid in training what compiling it costs. "
    "Another gave each program of a GPU several rows of RMSNorm. Both were done again on the "
    "devices below, each claim by what can be measured there."
)
NOT_PUBLISHED = "not measured"
"""What a finding has in the place of a published figure where it is a statement of ours."""
HOLDS = {
    "confirmed": "holds",
    "refuted": "does not hold",
    "inconclusive": "undecided",
    "quick run": "undecided by a quick run",
    "arithmetic": "follows from other figures",
    "not applicable": "does not apply",
}
"""A verdict in the story's words, in the order of the story."""
COLORS = ("#d08020", "#1f5a8f", "#1a7a36", "#b03060", "#6a51a3", "#1b8a8f", "#a0522d", "#777777")
"""The published figures' first."""


class Claim(NamedTuple):
    """A claim of a study in a sentence, and the published rows that it is about."""

    study: Study
    text: str
    keys: tuple[str, ...]


CLAIMS = (
    Claim(
        "mega-kernel",
        "All layers of a small transformer in one program make its forward 3.00 to 4.17 times as "
        "fast as two programs a layer.",
        ("whole-15m", "whole-110m"),
    ),
    Claim(
        "mega-kernel",
        "Each program that is called costs about 160 us besides its arithmetic.",
        ("call-price",),
    ),
    Claim(
        "mega-kernel",
        "100 micro-steps an update in the place of 10 make training 4.74 times as fast, as every "
        "update compiles its weights into programs.",
        ("accum-100",),
    ),
    Claim("mega-kernel", "Weights have to be constants of a program.", ("mutable-inputs",)),
    Claim(
        "mega-kernel",
        "What runs while something is compiled in the background is 1.13 times as slow.",
        ("overlap-beside",),
    ),
    Claim(
        "mega-kernel",
        "A process may compile as often as it likes: 312 and 150 times without a failure.",
        ("budget-312", "budget-150"),
    ),
    Claim(
        "mega-kernel",
        "A line printed to a terminal at each step makes training 7.4 times slower.",
        ("terminal-slow",),
    ),
    Claim(
        "block-row",
        "16 rows in a program in the place of one make RMSNorm, forward and backward, 1.66 to 5.55 "
        "times as fast, up to 512 columns.",
        tuple(
            key
            for key, row in PUBLISHED.items()
            if key.startswith("norm-both-") and not row.row.endswith(" 768")
        ),
    ),
    Claim("block-row", "From 4,096 rows on that pays in every pass.", ("norm-rows",)),
)


class Answer(NamedTuple):
    """Of a claim and a device: the first of the statements about it that have one verdict, how many
    have it, and of how many."""

    device: str
    verdict: str
    alike: int
    of: int
    first: Finding

    @property
    def words(self) -> str:
        """Whether the claim holds."""
        return NEEDS_A_MAC if _needs_a_mac(self.first) else HOLDS[self.verdict]

    @property
    def share(self) -> str:
        return f"{self.alike} of {self.of} statements" if self.of > 1 else ""

    @property
    def figures(self) -> str:
        return f"{self.first.claim}: {self.first.ours}" if self.first.ours else self.first.why


def _needs_a_mac(finding: Finding) -> bool:
    return finding.why.startswith(NEEDS_A_MAC)


def answers(report: Report, study: Study) -> Iterator[tuple[str, list[Answer]]]:
    """Every claim of a study that has an answer: its text, and by device what holds of it first.
    A statement that no study published is no answer."""
    for claim in CLAIMS:
        by_device: list[Answer] = []
        for device in report.devices if claim.study == study else ():
            findings = [
                finding
                for finding in report.findings(device)
                if set(finding.answers) & set(claim.keys) and finding.published != NOT_PUBLISHED
            ]
            for verdict in HOLDS:
                if alike := [finding for finding in findings if finding.verdict == verdict]:
                    by_device.append(Answer(device, verdict, len(alike), len(findings), alike[0]))
        if by_device:
            yield claim.text, by_device


def introduction(report: Report) -> list[str]:
    """What was studied, then a sentence for each device that has findings: how many statements
    hold there. Nothing where no device has any."""
    sentences = []
    for device in report.devices:
        findings = list(report.findings(device))
        if not findings:
            continue
        counts = report.verdicts(device)
        mac = sum(map(_needs_a_mac, findings))
        undecided = counts["inconclusive"] + counts["quick run"] + counts["arithmetic"]
        sentences.append(
            f"On {device}, of {len(findings)} statements {counts['confirmed']} hold, "
            f"{counts['refuted']} do not, {undecided} are undecided by its records, "
            f"{counts['not applicable']} do not apply there"
            + (f", {mac} of these as they need a Mac." if mac else ".")
        )
    return [INTRODUCTION, *sentences] if sentences else []


class Plot(NamedTuple):
    """Speedups of some published rows, theirs and ours; `across` says what the rows are, `series`
    names what a finding is of."""

    title: str
    across: str
    keys: tuple[str, ...]
    series: Callable[[Finding], str]


def _last_words(finding: Finding) -> str:
    way = finding.claim.rsplit(", ", 1)[-1]
    return {"one by one": "from Python", "graph": "CUDA graph"}.get(way, way)


PLOTS = (
    Plot(
        "One call in the place of separate calls",
        "12 feed-forward layers, columns/hidden; whole models",
        ("ffn-64", "ffn-128", "ffn-288", "ffn-768", "whole-15m", "whole-110m"),
        _last_words,
    ),
    Plot(
        "More micro-steps an update, over 10",
        "micro-steps an update",
        ("accum-50", "accum-100", "accum-500"),
        lambda finding: finding.claim.partition(":")[0],
    ),
    Plot(
        "RMSNorm, forward and backward: 16 rows in a program, over one",
        "rows x columns",
        tuple(f"norm-both-32768-{width}" for width in (64, 128, 256, 512, 768)),
        lambda finding: "Liger's kernels",
    ),
)


def speedups(report: Report, plot: Plot) -> dict[str, dict[str, float]]:
    """Our speedups by device and series, of every published row that has one."""
    speedups: dict[str, dict[str, float]] = {}
    for part in report.parts:
        for finding in part.findings:
            for key in set(finding.answers) & set(plot.keys):
                if finding.ratio is not None:
                    name = f"{part.device}, {plot.series(finding)}"
                    speedups.setdefault(name, {}).setdefault(key, finding.ratio * published(key))
    return speedups


def published(key: str) -> float:
    """The speedup of a published row."""
    return float(PUBLISHED[key].values["speedup"])


def draw(report: Report, plot: Plot) -> plots.Figure | None:
    """Bars for each published row; None where no device has one."""
    ours = speedups(report, plot)
    theirs = {key: published(key) for key in plot.keys}
    names = {key: PUBLISHED[key].row.replace(", ", ",\n") for key in plot.keys}
    if not ours:
        return None
    series = {"published": theirs, **ours}
    return plots.bars(
        plot.title, series, plot.across, "times as fast", names=names, colors=COLORS, at=1
    )
