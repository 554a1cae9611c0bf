"""terminal-io: what it costs a training step to be watched on a slow terminal.

Blocks of updates are timed in turn, unwatched and with the package's display; then one long block
with a line printed at every update, as trainers do. The terminal is a pseudo-terminal that takes
few bytes a second, as one over a poor line does.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from onelaunch.bench.record import Row
from onelaunch.bench.rig import trainer as timed_trainer
from onelaunch.training.display import Display, Header
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe

UNIT = "ms/update"
BYTES_PER_SECOND = 4000
# A pseudo-terminal takes about 20 kB at once, then nothing until most of that was read: what is
# printed must be several times that before its speed is the terminal's.
NAIVE_UPDATES = 660

CASES = {
    "stories260k 8x128": {
        "model.preset": "stories260k",
        "model.max_seq_len": 128,
        "train.batch_size": 8,
    },
    # a step of a few milliseconds: the hardest case
    "small 4x32": {
        "model.preset": "stories260k",
        "model.n_layers": 2,
        "model.max_seq_len": 32,
        "train.batch_size": 4,
    },
}
QUICK = ("small 4x32",)
TERMINALS = {"slow": BYTES_PER_SECOND, "fast": None}


def run(device: str, quick: bool, say: Callable[[str], None]) -> list[Row]:
    """Time every case; returns one row each, lower is better."""
    rows = []
    for case, settings in CASES.items():
        if quick and case not in QUICK:
            continue
        recipe = Recipe().with_settings({**settings, "train.updates": 10**6}, "bench")
        for kind, rate in TERMINALS.items():
            with timed_trainer(recipe, device) as trainer:
                samples = watch(trainer, rate, blocks=9 if quick else 15, seconds=1.0)
            rows.append(_row(f"{case} {kind} terminal", samples, rate, say))
    return rows


def _row(
    case: str, samples: dict[str, list[float]], rate: int | None, say: Callable[[str], None]
) -> Row:
    extra = [shown / bare - 1 for shown, bare in zip(samples["ours"], samples["none"], strict=True)]
    ours, none = Row.of(case, samples["ours"]), Row.of(case, samples["none"])
    printed, cost = samples["naive"][0], Row.of(case, extra)
    times = printed / none.ours
    say(
        f"{case}: unwatched {none.ours:.2f} ms/update, our display {ours.ours:.2f} "
        f"({cost.ours:+.1%}), a line each update {printed:.2f} ({times:.1f}x)"
    )
    return Row.of(
        case,
        samples["ours"],
        peers={"unwatched": none.ours, "a line each update": printed},
        notes={
            "cost_of_display": round(cost.ours, 4),
            "cost_spread": [round(v, 4) for v in cost.spread or ()],
            "times_naive": round(times, 2),
            "terminal_bytes_per_second": rate,
        },
    )


def watch(
    trainer: Trainer,
    rate: int | None,
    blocks: int,
    seconds: float,
    naive_updates: int = NAIVE_UPDATES,
) -> dict[str, list[float]]:
    """Milliseconds per update of each block, by how it was watched: none, ours, naive (one long
    block), on a terminal that takes `rate` bytes a second (None: all at once)."""
    samples: dict[str, list[float]] = {"none": [], "ours": [], "naive": []}
    with terminal(rate) as descriptor:
        for _ in range(3):
            trainer._update()
        start = time.perf_counter()
        trainer._update()
        per_block = max(3, round(seconds / (time.perf_counter() - start)))
        for block in range(blocks):
            for how in ("none", "ours") if block % 2 else ("ours", "none"):
                samples[how].append(_block(trainer, how, per_block, descriptor) * 1e3)
        if rate is not None:
            _fill(descriptor)
        samples["naive"].append(_block(trainer, "naive", naive_updates, descriptor) * 1e3)
    return samples


def _block(trainer: Trainer, how: str, updates: int, descriptor: int) -> float:
    """Seconds per update of one block."""
    display = None
    if how == "ours":
        header = Header("onelaunch train: bench", ("model", "data"), 10**6, 1, 1024)
        display = Display(header, (trainer.progress.update, 0), descriptor)
    trainer.display = display
    start = time.perf_counter()
    for _ in range(updates):
        trainer._update()
        if how == "naive":
            at = trainer.progress
            line = (
                f"update {at.update} | loss 2.3456 | lr 1.000e-03 | 12.34 ms | 123,456 tokens/s\n"
            )
            os.write(descriptor, line.encode())
    took = time.perf_counter() - start
    trainer.display = None
    if display is not None:
        display.close(seconds=0.3)
    return took / updates


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


def _fill(descriptor: int) -> None:
    """Write until the terminal takes no more."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"." * 99 + b"\n")
    os.set_blocking(descriptor, True)
