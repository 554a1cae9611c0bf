"""The display: never in training's way, at most four frames a second, plain lines to a pipe."""

import os
import threading
import time

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


SMALL = {
    "model.preset": "stories260k",
    "model.n_layers": 2,
    "model.max_seq_len": 32,
    "train.batch_size": 4,
    "train.threads": 1,
    "train.updates": 10**6,
}


class Accounted(Display):
    """A display that adds up what the training thread spends in it, in the processor's time."""

    spent = 0.0

    def progress(self, update: int, micro: int) -> None:
        start = time.thread_time()
        super().progress(update, micro)
        self.spent += time.thread_time() - start

    def push(self, record: dict) -> None:
        start = time.thread_time()
        super().push(record)
        self.spent += time.thread_time() - start


def share_of_watching(rate: int | None, seconds: float = 3.0) -> float:
    """The display's part of the processor's time while a small model trains: its own thread, and
    what the training thread spends in its calls. Read from their clocks, not by comparing two runs:
    other work on the machine, and its changing speed, do not move it."""
    recipe = Recipe().with_settings(SMALL, "test")
    with bench_trainer(recipe, "cpu") as trainer, terminal_io.terminal(rate) as descriptor:
        trainer._update()
        display = trainer.display = Accounted(HEADER, (0, 0), descriptor)
        clock = time.pthread_getcpuclockid(display._thread.ident)
        time.sleep(0.4)  # what the thread imports once is no cost of watching
        drawn, start = time.clock_gettime(clock), time.process_time()
        while time.process_time() - start < seconds:
            trainer._update()
        total = time.process_time() - start
        drawing = time.clock_gettime(clock) - drawn
        trainer.display = None
        display.close(seconds=0.3)
        return (drawing + display.spent) / total


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of threads here")
@pytest.mark.parametrize("rate", [BYTES_PER_SECOND, None], ids=["slow", "fast"])
def test_watching_costs_little(rate):
    assert share_of_watching(rate) < 0.01


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clocks of threads here")
def test_a_display_that_draws_too_often_is_caught(monkeypatch):
    monkeypatch.setattr("onelaunch.training.display.DRAWS_PER_SECOND", 100)
    assert share_of_watching(None, 1.5) > 0.02


def test_printing_each_step_waits_for_a_slow_terminal():
    with bench_trainer(Recipe().with_settings(SMALL, "test"), "cpu") as trainer:
        worked = time.thread_time()
        samples = watch(trainer, BYTES_PER_SECOND, blocks=0, seconds=0.1, naive_updates=330)
        worked = time.thread_time() - worked
    took = 330 * samples["naive"][0] / 1e3
    assert took > 2.0, "330 lines of some 60 bytes at 4,000 a second, less what is buffered"
    assert took > 1.5 * worked


@pytest.mark.parametrize("n", [1, 2, 7, 100, 5000])
def test_sparkline_fits_and_spans(n):
    line = sparkline([float(n - i) for i in range(n)], 40)
    assert len(line) == min(n, 40)
    if n > 1:
        assert (line[0], line[-1]) == (chr(0x2588), chr(0x2581))
