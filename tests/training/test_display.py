"""The display: never in training's way, at most four frames a second, plain lines to a pipe."""

import os
import statistics
import threading
import time
from types import SimpleNamespace

import pytest

from onelaunch.bench import terminal_io
from onelaunch.bench.rig import trainer as bench_trainer
from onelaunch.bench.terminal_io import BYTES_PER_SECOND, watch
from onelaunch.training.clock import PARTS
from onelaunch.training.display import DRAWS_PER_SECOND, Display, Header, sparkline
from onelaunch.training.recipe import Recipe

HEADER = Header("onelaunch train: runs/x", ("model  m", "data   d"), 100, 2, 64)
CLEAR_LINE = b"\x1b[2K"


def update_record(update: int) -> dict:
    seconds = dict.fromkeys((*PARTS, "unexplained"), 0.0) | {"wall": 1.0, "forward": 0.75}
    return {"kind": "update", "update": update, "loss": 2.5, "lr": 1e-3, "seconds": seconds}


@pytest.fixture
def screen():
    """A pseudo-terminal and what has been read from it so far."""
    import pty

    master, slave = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while data := os.read(master, 65536):
                seen.extend(data)
        except OSError:
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    yield slave, seen
    os.close(slave)
    reader.join(5)
    os.close(master)


def test_plain_lines_to_a_pipe():
    read, write = os.pipe()
    display = Display(HEADER, (0, 0), write)
    display.push(update_record(3))
    display.push({"kind": "eval", "update": 3, "loss": 2.25})
    display.progress(3, 1)
    display.notice("a notice [bold]as it is[/bold]")
    display.close()
    os.close(write)
    text = os.read(read, 65536).decode()
    os.close(read)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[:3] == ["onelaunch train: runs/x", "model  m", "data   d"]
    assert "a notice [bold]as it is[/bold]" in lines
    status = next(line for line in lines if line.startswith("update"))
    for part in ("update 3/100", "micro-step 1/2", "loss 2.5000", "val 2.2500", "lr 1.00e-03"):
        assert part in status


def test_three_speeds_are_told_apart():
    display = Display(HEADER, (0, 0), os.open(os.devnull, os.O_WRONLY))
    display.close()
    display._speed.clear()
    display._speed.extend([(10.0, 100), (12.0, 110)])
    shown = dict(display.status())
    assert shown["micro-steps/s"] == "5"
    assert shown["updates/s"] == "2.5"
    assert shown["tokens/s"] == "320"


def test_a_terminal_is_redrawn_at_most_four_times_a_second(screen):
    slave, seen = screen
    display = Display(HEADER, (0, 0), slave)
    start = time.monotonic()
    update = 0
    while time.monotonic() - start < 1.5:
        update += 1
        display.progress(update % 100, 0)
        display.push(update_record(update))
        time.sleep(0.001)
    display.close()
    elapsed = time.monotonic() - start
    time.sleep(0.1)
    frames = bytes(seen).count(HEADER.title.encode())
    assert update > 50
    assert (
        2 <= frames <= DRAWS_PER_SECOND * elapsed + 3
    )  # the first, the last, and one for rounding
    assert "forward 75.0%" in seen.decode()


def test_an_unchanged_panel_is_not_drawn_again(screen):
    slave, seen = screen
    display = Display(HEADER, (5, 0), slave)
    time.sleep(1.6)
    assert bytes(seen).count(HEADER.title.encode()) <= 2
    display.close()


def test_a_terminal_that_stands_still_stops_nobody():
    import pty

    master, slave = pty.openpty()  # nobody reads
    display = Display(HEADER, (0, 0), slave)
    filler = threading.Thread(target=os.write, args=(slave, b"x" * 1_000_000), daemon=True)
    filler.start()
    time.sleep(0.3)
    start = time.monotonic()
    for update in range(20_000):
        display.push(update_record(update))
        display.notice("line")
    assert display.dropped > 0
    pushed = time.monotonic() - start
    display.close(seconds=0.5)
    assert display._thread.is_alive(), "the terminal was to be stuck"
    assert pushed < 20, "pushing waited for the terminal"
    os.close(master)  # hangs up: both threads end
    display._thread.join(10)
    assert not display._thread.is_alive()


@pytest.mark.parametrize("rate", [BYTES_PER_SECOND, None], ids=["slow", "fast"])
def test_watching_costs_little_where_printing_each_step_costs_much(rate, monkeypatch):
    """Blocks of updates in turn on one pseudo-terminal: unwatched, watched, printed.

    What watching costs is measured in the processor's time, all threads together: other work on the
    machine does not move it, and that nobody waits for the terminal is another test's matter.
    """
    settings = {
        "model.preset": "stories260k",
        "model.n_layers": 2,
        "model.max_seq_len": 32,
        "train.batch_size": 4,
        "train.threads": 1,
        "train.updates": 10**6,
    }
    processor = SimpleNamespace(**(vars(time) | {"perf_counter": time.process_time}))
    with bench_trainer(Recipe().with_settings(settings, "test"), "cpu") as trainer:
        with monkeypatch.context() as patch:
            patch.setattr(terminal_io, "time", processor)
            samples = watch(trainer, None, blocks=9, seconds=0.4, naive_updates=1)
        ours = [a / b for a, b in zip(samples["ours"], samples["none"], strict=True)]
        assert statistics.median(ours) < 1.03, samples
        if rate is not None:
            samples = watch(trainer, rate, blocks=1, seconds=0.4, naive_updates=330)
            assert samples["naive"][0] > 1.5 * samples["none"][0], "the terminal was to be slow"


@pytest.mark.parametrize("n", [1, 2, 7, 100, 5000])
def test_sparkline_fits_and_spans(n):
    line = sparkline([float(n - i) for i in range(n)], 40)
    assert len(line) == min(n, 40)
    if n > 1:
        assert (line[0], line[-1]) == (chr(0x2588), chr(0x2581))
