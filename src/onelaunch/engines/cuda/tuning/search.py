"""The order of the timings, and the choice of the form, without a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking, Limits, default, default_fused
from onelaunch.engines.cuda.forms import STAGED, Form
from onelaunch.engines.cuda.tuning.descent import Best, descend
from onelaunch.engines.cuda.tuning.space import H200, WRITES_X, options, x_columns
from onelaunch.engines.cuda.tuning.store import RULE, Choice
from onelaunch.errors import RunFailed
from onelaunch.plan import every_depth

TIE = 0.03
"""Fewer launches than one per stage have to be faster by so much: less is noise."""
FINAL_LOOKS = 3
FUSED_WARPS = 4
READS_SUMSQ = ("qkv", "gate_up", "head")
"""Kinds whose kernels have the number of tiles in a row of x, and so of its partial sums of
squares, as a constant."""
COMPILING, TILES, DEPTHS = "compiling kernels", "timing tiles", "timing fusion depths"
"""The phases that `progress` hears of."""

Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and of about how much."""


@dataclass(frozen=True)
class Job:
    """Kernels to compile: of a form all, or those of one kind of stage."""

    form: Form
    kind: str | None = None


def ignore_progress(phase: str, done: int, total: int) -> None:
    """The default: report no progress."""


@dataclass
class Search:
    """The search for one shape. `compile` compiles what will probably be timed, several kernels at
    a time; `time_us` returns the microseconds of a forward, inf where it cannot run."""

    config: ModelConfig
    batch: int
    sequence: int
    itemsize: int
    compile: Callable[[Sequence[Job]], None]
    time_us: Callable[[Form], float]
    limits: Limits = H200
    progress: Progress = ignore_progress
    _us: dict[str, float] = field(default_factory=dict)
    _tried: int = 0

    def run(self) -> Choice:
        """The fastest form of the shape with its fastest tiles.

        First the tiles of one kernel per stage: those of attention and of what writes x, then those
        of what reads its sums of squares. Then all in one launch, with the rule's tiles and with
        the best of FUSED_WARPS warps, one and two CTAs a multiprocessor; then the other fusion
        depths with the best of these. Raises RunFailed where nothing runs.
        """
        began = time.monotonic()
        rows = self.batch * self.sequence
        self._rule = default(self.config, rows, self.itemsize, self.limits)
        fused_rule = default_fused(self.config, rows, self.itemsize, self.limits)
        best, few_warps = self._staged(fused_rule)
        if (fused := self._fused(fused_rule, few_warps)) is not None:
            self._look_again(best, fused)
            if self._us[fused.name] < self._us[STAGED] * (1 - TIE):
                best = fused
        us = {name: round(us, 2) for name, us in self._us.items() if math.isfinite(us)}
        if STAGED not in us:
            raise RunFailed(f"{self.batch}x{self.sequence}: no form of it runs on this device")
        return Choice(
            best.name,
            dict(best.blockings),
            best.programs,
            us,
            round(time.monotonic() - began, 2),
            self._tried,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _look_again(self, *finalists: Form) -> None:
        """Time them in turns: what each took before was the least of more or fewer times."""
        times = [[self._timed(finalist) for finalist in finalists] for _ in range(FINAL_LOOKS)]
        for finalist, of in zip(finalists, zip(*times, strict=True), strict=True):
            self._us[finalist.name] = sorted(of)[FINAL_LOOKS // 2]

    def _staged(self, fused_rule: dict[str, Blocking]) -> tuple[Form, dict[str, Blocking]]:
        """The best tiles, and the best of FUSED_WARPS warps."""
        rule = self._rule
        widths = x_columns(self.config, self.batch * self.sequence)
        first = {kind: self._options(kind, *widths) for kind in WRITES_X}
        first["attention"] = self._options("attention", widths[0])
        # of what reads the sums of squares the rule's tiles alone, but for every width
        jobs = [Job(Form("all", fused_rule, self.limits.multiprocessors))]
        jobs += [
            Job(Form(STAGED, rule | _as_wide(width)), kind)
            for kind in READS_SUMSQ
            for width in widths
        ]
        descent = self._descend(rule, first, jobs)
        best = rule | descent.blockings
        width = best["down"].columns
        second = {kind: self._options(kind, width) for kind in READS_SUMSQ}
        again = self._descend(best, second, [])
        best |= again.blockings
        times = descent.times | again.times
        return Form(STAGED, best), _of_few_warps(best, times, fused_rule)

    def _fused(self, rule: dict[str, Blocking], few_warps: dict[str, Blocking]) -> Form | None:
        """The best of fewer launches, None where they do not run."""
        of = self.limits.multiprocessors
        sets = [rule] if few_warps == rule else [rule, few_warps]
        if few_warps != rule:
            self.compile([Job(Form("all", few_warps, of))])
        whole = [Form("all", tiles, programs) for tiles in sets for programs in (of, 2 * of)]
        depths = [str(d) for d in every_depth(self.config.n_layers) if d not in ("stage", "all")]
        total = len(whole) + len(depths)
        best, us = self._best(whole, 0, total)
        if not math.isfinite(us):
            return None
        others = [Form(depth, best.blockings, best.programs) for depth in depths]
        other, other_us = self._best(others, len(whole), total)
        return other if other_us < us else best

    def _best(self, forms: Sequence[Form], before: int, total: int) -> tuple[Form, float]:
        """The fastest."""
        timed = []
        for i, form in enumerate(forms):
            timed.append((self._timed(form), i))
            self.progress(DEPTHS, before + i + 1, total)
        us, number = min(timed)
        return forms[number], us

    def _descend(
        self,
        base: dict[str, Blocking],
        listed: Mapping[str, Sequence[Blocking]],
        jobs: Sequence[Job],
    ) -> Best:
        """Compile `jobs` and the options listed, and walk through these."""
        more = [Job(Form(STAGED, base | _around(k, o)), k) for k, of in listed.items() for o in of]
        self.compile([*jobs, *more])
        done, total = 0, len(more)

        def time_us(blockings: Mapping[str, Blocking]) -> float:
            nonlocal done
            us = self._timed(Form(STAGED, base | dict(blockings)))
            done += 1
            self.progress(TILES, min(done, total), total)
            return us

        return descend(listed, time_us)

    def _timed(self, form: Form) -> float:
        self._tried += 1
        us = self.time_us(form)
        by_rule = form.name == STAGED and form.blockings == self._rule
        for name in (form.name, RULE) if by_rule else (form.name,):
            self._us[name] = min(us, self._us.get(name, math.inf))
        return us

    def _options(self, kind: str, *widths: int) -> list[Blocking]:
        c, batch, sequence = self.config, self.batch, self.sequence
        return [
            option
            for width in widths
            for option in options(c, batch, sequence, self.itemsize, kind, width, self.limits)
        ]


def _around(kind: str, option: Blocking) -> dict[str, Blocking]:
    """An option with what must be as wide."""
    return (_as_wide(option.columns) if kind in WRITES_X else {}) | {kind: option}


def _as_wide(columns: int) -> dict[str, Blocking]:
    """Some tiles of x of these columns: of other kernels, which see no more of them."""
    return dict.fromkeys(WRITES_X, Blocking(16, columns))


def _of_few_warps(
    best: Mapping[str, Blocking],
    times: Mapping[tuple[str, Blocking], float],
    otherwise: Mapping[str, Blocking],
) -> dict[str, Blocking]:
    """Of each kind its best blocking; where that has other warps than FUSED_WARPS, or is the
    library's product, the fastest that has so many, or else the one of `otherwise`."""
    chosen = dict(best)
    for kind, blocking in best.items():
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
