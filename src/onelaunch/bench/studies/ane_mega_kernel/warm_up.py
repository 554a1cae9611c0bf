"""warm-up: what the first micro-steps take, and from which on they take no less.

The published study saw 258 ms in the first micro-step after its programs were made, 175 ms in the
30th and 169 ms from the 136th on, so that updates of 10 were never warm. Here every micro-step from
the first of a fresh process on, with PyTorch, on the engine that `onelaunch train` takes on the
device, and through ML Programs; through these also those after an update, on new programs in a warm
process. Waiting for a compilation is not counted. An engine's code is compiled by a process before
and kept; what its first micro-steps take to read it and to capture CUDA graphs is counted. The
first micro-step after its first update is of a kind that has not been captured before, so those
after it are timed, too. Steady is a micro-step from which on the running median stays within 1% of
its end.

A fresh process is `python -m onelaunch.bench.studies.ane_mega_kernel.warm_up WHAT DEVICE MODEL
TOKENS STEPS UPDATES AFTER`: STEPS micro-steps, then UPDATES updates, each followed by AFTER more;
it prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.children import run_child
from onelaunch.bench.core.findings import (
    Finding,
    Verdict,
    above,
    standard_error,
    unless,
    without_evaluated_seconds,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.tables import document, spread
from onelaunch.bench.core.views import CASE, N, column, published, table_of
from onelaunch.bench.studies.ane_mega_kernel.program_training import (
    ENGINE_NAMES,
    PYTORCH_NAME,
    WARM_MICRO_STEPS,
    WARM_UPDATES,
    Driver,
    driver,
    engine_driver,
    log_without_engine,
    own_engine,
    pytorch_driver,
    why_no_programs,
)

UNIT = "ms"
MARKS = (1, 30, 136)
"""The study's; the last stands for all from there on."""
END_SHARE = 0.25
"""Of the micro-steps: the last ones, with whose median others are compared."""
WINDOW = 9
"""Micro-steps of a running median: short compared with the study's 136."""
WITHIN, ROUGHLY = 0.01, 0.05
SLOWER = 1.1
"""Over the end: a first micro-step of more is a cold one. The study's is 1.53."""
PYTORCH = (("stories260k", 64, 240, 5), ("stories15m", 32, 240, 3))
"""Model, tokens, micro-steps, processes."""
PROGRAMS = (("stories260k", 64, 200, 2),)
QUICK_PYTORCH = (("stories260k", 64, 180, 2),)
QUICK_PROGRAMS = (("stories260k", 64, 48, 1),)
ENGINE_AFTER, QUICK_ENGINE_AFTER = 160, 40
"""Micro-steps after an engine's first update; the cases are PyTorch's."""
UPDATES, AFTER = 4, 24
QUICK_UPDATES, QUICK_AFTER = 2, 10
ENGINE = "engine"
CHILD = (sys.executable, "-m", "onelaunch.bench.studies.ane_mega_kernel.warm_up")
NOTES = {
    "CPU engine": " The CPU engine's code was compiled by a process before; reading it is counted.",
    "CUDA engine": " The CUDA engine's kernels were compiled by a process before. Its first two "
    "micro-steps launch them one by one and the third captures a CUDA graph; the first one after "
    "the first update captures another, which overwrites gradients. All of that is counted.",
}
"""What the table says where a case is of an engine."""


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    for model, sequence, steps, processes in QUICK_PYTORCH if quick else PYTORCH:
        args = PYTORCH_NAME, device, model, sequence, steps, 0, 0
        results = [_child(*args) for _ in range(processes)]
        yield from _rows(f"PyTorch {model} 1x{sequence}", [each["first"] for each in results])
        if engine := own_engine(model, device):
            case = f"{ENGINE_NAMES[engine]} {model} 1x{sequence}"
            of_engine = ENGINE, device, model, sequence
            _child(*of_engine, WARM_MICRO_STEPS, WARM_UPDATES, WARM_MICRO_STEPS)  # compiles
            after = QUICK_ENGINE_AFTER if quick else ENGINE_AFTER
            results = [_child(*of_engine, steps, 1, after) for _ in range(processes)]
            yield from _rows(case, [each["first"] for each in results])
            fresh = [times for each in results for times in each["after"]]
            yield from _rows(f"{case} after the first update", fresh)
        else:
            log_without_engine(device, log)
    if reason := why_no_programs(device):
        log(f"without ML Programs: {reason}")
        return
    updates, after = (QUICK_UPDATES, QUICK_AFTER) if quick else (UPDATES, AFTER)
    for model, sequence, steps, processes in QUICK_PROGRAMS if quick else PROGRAMS:
        case = f"ML Programs {model} 1x{sequence}"
        args = "ML Programs", device, model, sequence, steps, updates, after
        results = [_child(*args) for _ in range(processes)]
        yield from _rows(case, [each["first"] for each in results])
        fresh = [times for each in results for times in each["after"]]
        yield from _rows(f"{case} after an update", fresh)


def _child(*args: str | int) -> dict[str, Any]:
    return dict(run_child([*CHILD, *map(str, args)]))


def main(what: str, device: str, model: str, *numbers: str) -> dict[str, Any]:
    """Print, in the fresh process, milliseconds of micro-steps with PyTorch, on our engine for the
    device, or through ML Programs."""
    tokens, *counts = (int(number) for number in numbers)
    if what == PYTORCH_NAME:
        return _measure(pytorch_driver(model, tokens, device), *counts)
    if what == ENGINE:
        with engine_driver(model, tokens, device, warm=False) as ours:
            return _measure(ours, *counts)
    with driver(model, tokens, staleness=0) as training:
        return _measure(training, *counts)


def _measure(training: Driver[Any], steps: int, updates: int, after: int) -> dict[str, Any]:
    """The first ones, and those after each update."""
    times: dict[str, Any] = {"first": _micro_steps(training, steps), "after": []}
    for _ in range(updates):
        training.step()
        training.engine.after_update()
        times["after"].append(_micro_steps(training, after))
    return times


def _micro_steps(training: Driver[Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        batch = training.next_batch()
        training.engine.telemetry()
        training.wait()
        start = time.perf_counter()
        training.engine.train_step(*batch, 1 / count)
        training.wait()
        seconds = time.perf_counter() - start
        seconds -= training.engine.telemetry().get("stall_seconds", 0.0)
        times.append(round(1e3 * seconds, 4))
    return times


def end_of(times: Sequence[float]) -> float:
    """The final time of micro-steps: the median of the last quarter."""
    return statistics.median(times[-max(1, round(END_SHARE * len(times))) :])


def steady_from(times: Sequence[float], within: float) -> int | None:
    """The number, from 1, of the first micro-step from which on the running median stays within a
    share of its end; None where that is first so in the last quarter, which is no answer."""
    half = WINDOW // 2
    # at the beginning no median: it would hide the first ones
    running = [
        statistics.median(times[max(0, i - half) : i + half + 1]) if i >= half else times[i]
        for i in range(len(times))
    ]
    end, first = end_of(running), len(times)
    while first > 0 and abs(running[first - 1] / end - 1) <= within:
        first -= 1
    return first + 1 if first < (1 - END_SHARE) * len(times) else None


def _rows(case: str, by_process: Sequence[Sequence[float]]) -> Iterator[Row]:
    """The marked micro-steps, and the end."""
    by_step = [statistics.median(step) for step in zip(*by_process, strict=True)]
    steps = len(by_step)
    for mark in (mark for mark in MARKS[:-1] if mark <= steps):
        row = Row.of(f"{case}, micro-step {mark}", [times[mark - 1] for times in by_process])
        row.notes = {"of": case, "mark": mark, "over_end": round(row.ours / end_of(by_step), 4)}
        yield row
    last = MARKS[-1] if steps > MARKS[-1] else 1 + steps - max(1, round(END_SHARE * steps))
    samples = [time for times in by_process for time in times[last - 1 :]]
    notes = {
        "of": case,
        "from": last,
        "steps": steps,
        "processes": len(by_process),
        "steady_from": steady_from(by_step, WITHIN),
        "roughly_from": steady_from(by_step, ROUGHLY),
        "by_step": [round(ms, 3) for ms in by_step],
    }
    yield Row.of(f"{case}, from {last} on", samples, notes=notes)


def findings(record: dict[str, Any]) -> list[Finding]:
    """The first micro-step, the 30th, and from where on they are steady, of each case."""
    results = []
    end = published("warm-136", "ms")
    rows = {(row["of"], row.get("mark")): row for row in record["rows"]}
    for case in dict.fromkeys(row["of"] for row in record["rows"]):
        last = rows[case, None]
        for key, mark in (("warm-1", MARKS[0]), ("warm-30", MARKS[1])):
            row = rows.get((case, mark))
            if row is None:
                continue
            ms = published(key, "ms")
            least = SLOWER if mark == 1 else 1 + WITHIN
            error = standard_error(last["spread"], row["n"]) / last["ours"]
            verdict = above(row["over_end"], least, error)
            results.append(
                Finding(
                    (key,),
                    f"{case}: micro-step {mark} takes longer than the last ones",
                    f"{ms / end:.2f} times as long ({ms:g} ms, then {end:g})",
                    f"{row['over_end']:.2f} times as long ({row['ours']:.2f} ms)",
                    verdict,
                    f"more than {least:g} times as long is confirmed{unless(verdict)}",
                    row["over_end"] / (ms / end),
                )
            )
        results.append(_steady(case, last))
    return without_evaluated_seconds(results)


def _steady(case: str, last: dict[str, Any]) -> Finding:
    steady, theirs = last["steady_from"], MARKS[-1]
    verdict: Verdict = "inconclusive"
    low, high = (end / last["ours"] - 1 for end in last["spread"])
    why = f"micro-steps at the end spread by {high:+.1%} and {low:+.1%}"
    if steady is not None and last["steps"] > theirs:
        verdict = "confirmed" if steady > theirs / 2 else "refuted"
        why = f"from {theirs // 2 + 1} or later on is confirmed; {why}"
    elif steady is not None:
        verdict = "quick run"
        why = f"only {last['steps']} micro-steps were timed; {why}"
    within, roughly = (
        "never" if first is None else f"from {first} on" for first in (steady, last["roughly_from"])
    )
    return Finding(
        ("warm-136",),
        f"{case}: micro-steps get faster for some hundred of them",
        f"from {theirs} on",
        f"within {WITHIN:.0%} {within}, within {ROUGHLY:.0%} {roughly}",
        verdict,
        why,
    )


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    rows, end = list(record["rows"]), published("warm-136", "ms")
    for mark in MARKS:
        key = f"warm-{mark}"
        ms, case = published(key, "ms"), f"study: {PUBLISHED[key].row}"
        rows.append({"case": case, "ours": f"{ms:g}", "over_end": ms / end})
    rows[-1]["steady_from"] = MARKS[-1]

    def first(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: str(row[key] or "never") if key in row else "-"

    parts = [
        table_of(
            rows,
            CASE,
            ("ms", lambda row: f"{row['ours']:.2f}" if "n" in row else row["ours"]),
            ("p20-p80", lambda row: spread(row, "{:.2f}".format)),
            N,
            column("over the end", "over_end", "{:.2f}"),
            (f"within {WITHIN:.0%} from", first("steady_from")),
            (f"within {ROUGHLY:.0%} from", first("roughly_from")),
        ),
        "Each process begins with its first micro-step; n is processes, or updates, and of the "
        "last rows all their micro-steps. The end is the median of the last quarter. Waiting for "
        "a compilation is not counted. The study's are after new programs were made."
        + "".join(
            note
            for engine, note in NOTES.items()
            if any(row["case"].startswith(engine) for row in rows)
        ),
    ]
    return document(record, "Warming up, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Micro-steps by number, over their end."""
    shown = [row for row in record["rows"] if "by_step" in row]
    if not shown:
        return None
    figure, (axes,) = plots.panels(1, 8, 4.6)
    for row in shown:
        end, numbers = end_of(row["by_step"]), range(1, len(row["by_step"]) + 1)
        axes.plot(numbers, [ms / end for ms in row["by_step"]], label=row["of"], linewidth=1)
    end = published("warm-136", "ms")
    theirs = [published(f"warm-{mark}", "ms") / end for mark in MARKS]
    axes.plot(MARKS, theirs, "k--", marker="x", label="study, M1 Pro's Neural Engine")
    title = f"Warming up, {record['device']}"
    plots.label(axes, "micro-step", "time over that of the last ones", title, log="xy")
    axes.get_legend().remove()  # type: ignore[union-attr]  # it would cover the lines
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
