"""terminal-io: what the display of a training step costs, on a slow terminal above all.

Blocks of updates are timed in turn: without display, with the package's, and with a line printed at
every update, as trainers do; to a file, a pipe that is read, a terminal that takes all at once, and
one that takes few bytes a second, as over a slow line. There the printed lines are timed in one
long block: the first ones stand in buffers.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, Verdict, below, standard_error, unless
from onelaunch.bench.core.record import Log, Row, percentiles
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.core.tables import digits, document, spread
from onelaunch.bench.core.views import column, published, table_of
from onelaunch.training.display import Display, Header
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "ms/update"
BYTES_PER_SECOND = 4000
# A pseudo-terminal takes about 20 kB at once, then nothing until most of that was read: what is
# printed must be several times that before its speed is the terminal's.
NAIVE_UPDATES, QUICK_NAIVE_UPDATES = 660, 330
# On the slow terminal, where the display's cost has to be distinguished from noise: many blocks.
SLOW_BLOCKS, BLOCKS, SECONDS = 120, 7, 0.4
QUICK_SLOW_BLOCKS, QUICK_BLOCKS, QUICK_SECONDS = 7, 3, 0.4
MOST_COST = 0.03
"""Of an update: what the display may cost anywhere, a slow terminal too."""
LEAST_TIMES = 2.0
"""From so many times an update on, a line each update is the pitfall that the study warns of; how
many times depends on the terminal's speed, which the study does not state."""
FREE = 0.05
"""Of an update: what a line written to a file may cost and still be nothing."""

CASES = {
    "stories260k 8x128": {
        "model.preset": "stories260k", "model.max_seq_len": 128, "train.batch_size": 8,
    },
    # a step of a few milliseconds: the hardest case
    "small 4x32": {
        "model.preset": "stories260k", "model.n_layers": 2, "model.max_seq_len": 32,
        "train.batch_size": 4,
    },
}  # fmt: skip
QUICK = ("small 4x32",)
SLOW = "slow terminal"
UNWATCHED, NAIVE = "unwatched", "a line each update"


def outputs() -> dict[str, Callable[[], AbstractContextManager[int]]]:
    """Descriptors of what is written to, by name."""
    return {
        SLOW: partial(terminal, BYTES_PER_SECOND),
        "fast terminal": terminal,
        "pipe": pipe,
        "file": file,
    }


def run(device: str, quick: bool, log: Log) -> list[Row]:
    """Time every case on every output; returns one row each, lower is better."""
    rows = []
    for case in QUICK if quick else CASES:
        recipe = Recipe().with_settings({**CASES[case], "train.updates": 10**6}, "bench")
        for kind, output in outputs().items():
            slow = kind == SLOW
            blocks = SLOW_BLOCKS if slow else BLOCKS
            seconds, updates = SECONDS, NAIVE_UPDATES
            if quick:
                blocks = QUICK_SLOW_BLOCKS if slow else QUICK_BLOCKS
                seconds, updates = QUICK_SECONDS, QUICK_NAIVE_UPDATES
            with timed_trainer(recipe, device) as trainer, output() as descriptor:
                samples = watch(trainer, descriptor, blocks, seconds, updates if slow else None)
            rows.append(_row(f"{case} {kind}", samples, BYTES_PER_SECOND if slow else None))
    return rows


def _row(case: str, samples: dict[str, list[float]], rate: int | None) -> Row:
    none, naive = (Row.of(case, samples[how]) for how in ("none", "naive"))
    cost = Row.of(case, _costs(samples["ours"], samples["none"]))
    times, paired = naive.ours / none.ours, {}
    if naive.n == none.n:
        times = ratio(samples["naive"], samples["none"])
        costs = _costs(samples["naive"], samples["none"])
        paired = {"naive_cost_spread": [round(v, 4) for v in percentiles(costs)]}
    notes = {
        "cost_of_display": round(cost.ours, 4),
        "cost_spread": [round(v, 4) for v in cost.spread or ()],
        "times_naive": round(times, 2),
        "naive_spread": [round(v, 4) for v in naive.spread or ()],
        "naive_n": naive.n,
        **paired,
        "terminal_bytes_per_second": rate,
    }
    peers = {UNWATCHED: none.ours, NAIVE: naive.ours}
    return Row.of(case, samples["ours"], peers=peers, notes=notes)


def _costs(some: list[float], none: list[float]) -> list[float]:
    """The time that a display adds to an update, block by block, as a share of it."""
    return [a / b - 1 for a, b in zip(some, none, strict=True)]


def watch(
    trainer: Trainer, descriptor: int, blocks: int, seconds: float, naive_updates: int | None
) -> dict[str, list[float]]:
    """Milliseconds per update of each block, by display: none, ours, or naive, which is a line each
    update to `descriptor`. Naive takes turns with the others where `naive_updates` is None, and is
    otherwise one block of so many, the terminal being full from its start."""
    for _ in range(3):
        trainer._update()
    start = time.perf_counter()
    trainer._update()
    per_block = max(3, round(seconds / (time.perf_counter() - start)))
    ways = ["none", "ours"] if naive_updates else ["none", "ours", "naive"]
    samples: dict[str, list[float]] = {"none": [], "ours": [], "naive": []}
    for block in range(blocks):
        for how in ways if block % 2 else reversed(ways):
            samples[how].append(_block(trainer, how, per_block, descriptor) * 1e3)
    if naive_updates:
        if os.isatty(descriptor):
            _fill(descriptor)
        samples["naive"].append(_block(trainer, "naive", naive_updates, descriptor) * 1e3)
    return samples


def _block(trainer: Trainer, how: str, updates: int, descriptor: int) -> float:
    """Seconds per update of one block."""
    display = None
    if how == "ours":
        lines = ("model", "data")
        header = Header("onelaunch train: bench", lines, 10**6, 1, 1024, trainer.flops)
        display = Display(header, (trainer.progress.update, 0), descriptor)
    trainer.display = display
    start = time.perf_counter()
    for _ in range(updates):
        trainer._update()
        if how == "naive":
            os.write(descriptor, _line(trainer.progress.update))
    took = time.perf_counter() - start
    trainer.display = None
    if display is not None:
        display.close(seconds=0.3)
    return took / updates


def _line(update: int) -> bytes:
    """A line as trainers print it."""
    text = f"update {update} | loss 2.3456 | lr 1.000e-03 | 12.34 ms | 123,456 tokens/s\n"
    return text.encode()


@contextmanager
def terminal(bytes_per_second: int | None = None) -> Iterator[int]:
    """A pseudo-terminal's descriptor. Its other side reads at once, or at most so many bytes a
    second; then the buffers between are full from the start, as they are after a while."""
    import pty

    master, slave = pty.openpty()
    closing = threading.Event()

    def read() -> None:
        while not closing.is_set():
            if bytes_per_second is None:
                select.select([master], [], [], 0.1)
                quota = 65536
            else:
                closing.wait(0.02)
                quota = bytes_per_second // 50
            # one read may return a few bytes only, however many wait
            while quota > 0 and select.select([master], [], [], 0)[0]:
                quota -= len(os.read(master, quota))

    if bytes_per_second is not None:
        _fill(slave)
    reader = threading.Thread(target=read, name="terminal", daemon=True)
    reader.start()
    try:
        yield slave
    finally:
        closing.set()
        reader.join()
        os.close(slave)
        os.close(master)


@contextmanager
def pipe() -> Iterator[int]:
    """A pipe's end to write to. Its other end is read at once."""
    source, sink = os.pipe()

    def read() -> None:
        while os.read(source, 65536):
            pass

    reader = threading.Thread(target=read, name="pipe", daemon=True)
    reader.start()
    try:
        yield sink
    finally:
        os.close(sink)
        reader.join()
        os.close(source)


@contextmanager
def file() -> Iterator[int]:
    """A file's descriptor."""
    with tempfile.TemporaryFile() as opened:
        yield opened.fileno()


def _fill(descriptor: int) -> None:
    """Write until the terminal accepts no more."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"." * 99 + b"\n")
    os.set_blocking(descriptor, True)


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings about lines to a file and to a slow terminal, and about the display's cost there."""
    results = []
    rows = {row["case"]: row for row in record["rows"]}
    for case in CASES:
        if row := rows.get(f"{case} file"):
            results.append(_to_a_file(case, row))
        if row := rows.get(f"{case} {SLOW}"):
            results += [_to_a_terminal(case, row), _by_the_display(case, row)]
    return results


def _to_a_file(case: str, row: dict[str, Any]) -> Finding:
    cost = row["times_naive"] - 1
    verdict = below(cost, FREE, standard_error(row["naive_cost_spread"], row["naive_n"]))
    return Finding(
        ("terminal-file",),
        f"{case}: a line each step to a file costs nothing",
        f"{published('terminal-file', 'micro-steps/s'):g} micro-steps/s",
        f"{_rate(row, NAIVE)} updates/s, {_rate(row, UNWATCHED)} unwatched",
        verdict,
        f"{cost:+.0%} an update; nothing is up to {FREE:.0%}{unless(verdict)}",
    )


def _to_a_terminal(case: str, row: dict[str, Any]) -> Finding:
    theirs, times = published("terminal-slow", "slower"), row["times_naive"]
    step, rate = row["peers"][UNWATCHED], row["terminal_bytes_per_second"]
    line = 1e3 * len(_line(NAIVE_UPDATES)) / rate
    verdict: Verdict = "confirmed" if times >= LEAST_TIMES else "refuted"
    why = f"a line takes that terminal {line:.0f} ms, a step {digits(step)} ms"
    if step > line:  # the terminal keeps up, so that it does not slow the steps
        verdict = "not applicable"
        why += ": it keeps up"
    return Finding(
        ("terminal-slow",),
        f"{case}: a line each step to a terminal that takes {rate:,} bytes a second makes steps "
        "several times slower",
        f"{theirs:g}x slower ({published('terminal-slow', 'micro-steps/s'):g} micro-steps/s)",
        f"{times:.2f}x slower ({_rate(row, NAIVE)} updates/s)",
        verdict,
        f"{why}; the study does not say how fast its terminal was",
        times / theirs,
    )


def _by_the_display(case: str, row: dict[str, Any]) -> Finding:
    cost = row["cost_of_display"]
    verdict = below(cost, MOST_COST, standard_error(row["cost_spread"], row["n"]))
    return Finding(
        ("terminal-slow",),
        f"{case}: our display costs less than {MOST_COST:.0%} of an update on that terminal",
        "not measured",
        f"{cost:+.1%} ({_cost_spread(row)})",
        verdict,
        "drawn by a thread of its own: a terminal that stands still delays nothing else"
        + unless(verdict),
    )


def _rate(row: dict[str, Any], peer: str) -> str:
    """Updates a second."""
    return digits(1e3 / row["peers"][peer])


def _cost_spread(row: dict[str, Any]) -> str:
    return " to ".join(f"{end:+.1%}" for end in row["cost_spread"])


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = [
        table_of(
            record["rows"],
            column("updates/s", "case"),
            ("unwatched", lambda row: _rate(row, UNWATCHED)),
            ("our display", lambda row: digits(1e3 / row["ours"])),
            column("it costs", "cost_of_display", "{:+.1%}"),
            ("p20-p80", _cost_spread),
            (NAIVE, lambda row: _rate(row, NAIVE)),
            column("slower", "times_naive", "{:.2f}x"),
            ("ms an update, p20-p80", lambda row: spread({"spread": row.get("naive_spread")})),
        ),
        f"Costs are medians of blocks timed in turn. The slow terminal takes "
        f"{BYTES_PER_SECOND:,} bytes a second; there a line each update is one long block, its "
        "buffers full from the start. The study: 4.68 micro-steps/s with lines to a file, 0.63 to "
        "a terminal, 7.4 times slower; it does not say how fast that terminal was.",
    ]
    return document(record, "What a display costs training, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Plot how many times slower an update is, by what is written to, printed and displayed."""
    rows = {row["case"]: row for row in record["rows"]}
    return plots.bars(
        f"What a display costs training, {record['device']}",
        {
            NAIVE: {case: row["times_naive"] for case, row in rows.items()},
            "our display": {case: 1 + row["cost_of_display"] for case, row in rows.items()},
        },
        "time of an update, times the unwatched one", "", across=True, at=1,
    )  # fmt: skip
