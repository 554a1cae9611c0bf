"""Measures the forms of one shape, and chooses: what is timed in which order, without a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking, default, default_fused
from onelaunch.engines.cuda.choice import RULE, STAGED, Choice
from onelaunch.engines.cuda.compilers import Job
from onelaunch.engines.cuda.search import (
    H200,
    KINDS,
    WRITES_X,
    Found,
    Limits,
    descend,
    options,
    x_columns,
)
from onelaunch.errors import RunFailed
from onelaunch.plan import every_depth

SECONDS = 60.0
# shares of the seconds by whose end each part stops
_FIRST_COMPILED, _FIRST_TIMED, _ALL_COMPILED, _ALL_TIMED, _FUSED_COMPILED = (
    0.35,
    0.6,
    0.7,
    0.85,
    0.93,
)
TIE = 0.03
"""Fewer launches than one a stage have to be faster by so much: less is noise."""
FINAL_LOOKS = 3
FUSED_WARPS = 4
READS_PARTS = ("qkv", "gate_up", "head")
"""How many tiles of x a row has is a constant of theirs."""


@dataclass(frozen=True)
class Candidate:
    """A form with its tiles; `programs`, of fewer launches than stages, is how many run at once."""

    form: str
    blockings: Mapping[str, Blocking]
    programs: int | None = None


Compile = Callable[[Sequence[Job], float], Sequence[str | None]]
"""Jobs and a deadline by the clock; for each None, or why it was not done."""
TimeUs = Callable[[Candidate], float]
"""Microseconds of a forward, inf where it cannot run."""


@dataclass
class Measurement:
    """What is measured, with what, and for how long. Only what `compile` has compiled is timed, and
    the rule's tiles, so that no caller waits for a compiler."""

    config: ModelConfig
    batch: int
    sequence: int
    itemsize: int
    compile: Compile
    time_us: TimeUs
    limits: Limits = H200
    seconds: float = SECONDS
    clock: Callable[[], float] = time.monotonic
    _compiled: set[object] = field(default_factory=set)
    _us: dict[str, float] = field(default_factory=dict)
    _tried: int = 0

    def run(self) -> Choice:
        """The fastest form of the shape with the tiles found for it.

        First the staged form's tiles: those of attention and of what writes x, then those of what
        reads its sums of squares. Then all in one launch, with the rule's tiles and with the best
        of FUSED_WARPS warps, one and two programs a multiprocessor; then the other fusion depths
        with the best of these. Raises RunFailed where nothing runs.
        """
        self._began = self.clock()
        rows = self.batch * self.sequence
        self._rule = default(self.config, rows, self.itemsize, self.limits)
        self._fused_rule = default_fused(self.config, rows, self.itemsize, self.limits)
        self._compiled |= set(_kernels(self._rule))
        best, few_warps = self._staged(self._rule)
        if (fused := self._fused(self._fused_rule, few_warps)) is not None:
            self._look_again(best, fused)
            if self._us[fused.form] < self._us[STAGED] * (1 - TIE):
                best = fused
        us = {form: round(us, 2) for form, us in self._us.items() if math.isfinite(us)}
        if STAGED not in us:
            raise RunFailed(f"{self.batch}x{self.sequence}: no form of it runs on this device")
        return Choice(
            best.form,
            dict(best.blockings),
            best.programs,
            us,
            round(self.clock() - self._began, 2),
            self._tried,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _look_again(self, *finalists: Candidate) -> None:
        """Time them in turns: what each took before was the least of more or fewer times."""
        times = [[self._timed(finalist) for finalist in finalists] for _ in range(FINAL_LOOKS)]
        for finalist, of in zip(finalists, zip(*times, strict=True), strict=True):
            self._us[finalist.form] = sorted(of)[FINAL_LOOKS // 2]

    def _staged(self, rule: dict[str, Blocking]) -> tuple[Candidate, dict[str, Blocking]]:
        """The best tiles, and the best of FUSED_WARPS warps."""
        widths = x_columns(self.config, self.batch * self.sequence)
        first = {kind: self._options(kind, *widths) for kind in WRITES_X}
        first["attention"] = self._options("attention", widths[0])
        # of what reads the sums of squares the rule's tiles alone, but for every width
        jobs = [self._job("all", self._fused_rule)]
        jobs += [
            self._job(STAGED, rule | _as_wide(width), kind)
            for kind in READS_PARTS
            for width in widths
        ]
        found = self._descend(rule, first, jobs, _FIRST_COMPILED, _FIRST_TIMED)
        best = rule | found.blockings
        width = best["down"].columns
        second = {kind: self._options(kind, width) for kind in READS_PARTS}
        again = self._descend(best, second, [], _ALL_COMPILED, _ALL_TIMED)
        best |= again.blockings
        times = found.times | again.times
        return Candidate(STAGED, best), _of_few_warps(best, times, self._fused_rule)

    def _fused(self, rule: dict[str, Blocking], few_warps: dict[str, Blocking]) -> Candidate | None:
        """The best of fewer launches, None where they do not run."""
        sets = [rule]
        if few_warps != rule:
            sets.append(few_warps)
            self._make([self._job("all", few_warps)], _FUSED_COMPILED)
        of = self.limits.multiprocessors
        whole = [Candidate("all", tiles, programs) for tiles in sets for programs in (of, 2 * of)]
        best, us = self._best(whole)
        if not math.isfinite(us):
            return None
        depths = map(str, every_depth(self.config.n_layers))
        others = [
            Candidate(depth, best.blockings, best.programs)
            for depth in depths
            if depth not in ("stage", "all")
        ]
        other, other_us = self._best(others)
        return other if other_us < us else best

    def _best(self, candidates: Sequence[Candidate]) -> tuple[Candidate, float]:
        """The fastest, as far as there is time for them."""
        timed = [
            (self._timed(c) if self.clock() < self._by(1.0) else math.inf, i)
            for i, c in enumerate(candidates)
        ]
        us, number = min(timed)
        return candidates[number], us

    def _descend(
        self,
        base: dict[str, Blocking],
        listed: Mapping[str, Sequence[Blocking]],
        jobs: Sequence[Job],
        compiled_by: float,
        timed_by: float,
    ) -> Found:
        """Compile `jobs` and the options listed, and walk through these."""
        # the likeliest of every kind first: there may not be time for all
        turns = max(map(len, listed.values()))
        ordered = [
            (kind, of[i]) for i in range(turns) for kind, of in listed.items() if i < len(of)
        ]
        more = [self._job(STAGED, base | _around(kind, o), kind) for kind, o in ordered]
        self._make([*jobs, *more], compiled_by)
        return descend(
            listed,
            lambda blockings: self._timed(Candidate(STAGED, base | dict(blockings))),
            self._by(timed_by),
            clock=self.clock,
        )

    def _make(self, jobs: Sequence[Job], by: float) -> None:
        for job, why in zip(jobs, self.compile(jobs, self._by(by)), strict=True):
            if why is None:
                self._compiled |= set(_kernels(job.blockings, job.form, job.kind))

    def _timed(self, candidate: Candidate) -> float:
        form = "all" if candidate.form != STAGED else STAGED  # every depth is the same kernel
        if not self._compiled.issuperset(_kernels(candidate.blockings, form)):
            return math.inf
        self._tried += 1
        us = self.time_us(candidate)
        by_rule = candidate.form == STAGED and candidate.blockings == self._rule
        for name in (candidate.form, RULE) if by_rule else (candidate.form,):
            self._us[name] = min(us, self._us.get(name, math.inf))
        return us

    def _options(self, kind: str, *widths: int) -> list[Blocking]:
        c, batch, sequence = self.config, self.batch, self.sequence
        return [
            option
            for width in widths
            for option in options(c, batch, sequence, self.itemsize, kind, width, self.limits)
        ]

    def _job(self, form: str, blockings: Mapping[str, Blocking], kind: str | None = None) -> Job:
        return Job(self.sequence, form, dict(blockings), kind)

    def _by(self, share: float) -> float:
        return self._began + share * self.seconds


def _kernels(
    blockings: Mapping[str, Blocking], form: str = STAGED, kind: str | None = None
) -> Iterator[object]:
    """What tells the kernels of a form apart."""
    if form != STAGED:
        yield form, tuple(blockings[kind] for kind in KINDS)
        return
    for each in KINDS if kind is None else (kind,):
        width = blockings["down"].columns if each in READS_PARTS else None
        yield each, blockings[each], width


def _around(kind: str, option: Blocking) -> dict[str, Blocking]:
    """An option with what must be as wide."""
    return (_as_wide(option.columns) if kind in WRITES_X else {}) | {kind: option}


def _as_wide(columns: int) -> dict[str, Blocking]:
    """Some tiles of x of these columns: of other kernels, which see no more of them."""
    return dict.fromkeys(WRITES_X, Blocking(16, columns))


def _of_few_warps(
    found: Mapping[str, Blocking],
    times: Mapping[tuple[str, Blocking], float],
    otherwise: Mapping[str, Blocking],
) -> dict[str, Blocking]:
    """Of each kind what was found, or where that has other warps than FUSED_WARPS, or is not
    written here, the fastest that has so many, or else another one."""
    chosen = dict(found)
    for kind, blocking in found.items():
        if blocking.warps == FUSED_WARPS and not blocking.library:
            continue
        fitting = {
            option: us
            for (of, option), us in times.items()
            if of == kind and option.warps == FUSED_WARPS and math.isfinite(us)
            if not option.library
            if kind not in WRITES_X or option.columns == blocking.columns
        }
        chosen[kind] = min(fitting, key=fitting.__getitem__) if fitting else otherwise[kind]
    if len({chosen[kind].columns for kind in WRITES_X}) > 1:
        chosen |= {kind: otherwise[kind] for kind in WRITES_X}
    return chosen
