"""The display: never in training's way, at most four frames a second, plain lines to a pipe."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from onelaunch.training.clock import PARTS
from onelaunch.training.display import DRAWS_PER_SECOND, Display, Header, sparkline
from onelaunch.training.flops import TrainingFlops
from tests.compilation.children import until

FLOPS = TrainingFlops(per_token=10**6)
HEADER = Header("onelaunch train: runs/x", ("model  m", "data   d"), 100, 2, 64, FLOPS)
SHOW_CURSOR = b"\x1b[?25h"


def update_record(update: int) -> dict:
    seconds = dict.fromkeys((*PARTS, "unexplained"), 0.0) | {"wall": 1.0, "forward": 0.75}
    return {
        "kind": "update",
        "update": update,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.75,
        "seconds": seconds,
    }


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


def test_the_wait_for_gradients_of_several_processes_is_a_part():
    read, write = os.pipe()
    display = Display(HEADER, (0, 0), write)
    for seconds in ({}, {"reduce": 0.25}):
        record = update_record(3)
        record["seconds"] |= seconds
        display.push(record)
    assert display.parts() == ["forward 75.0%", "reduce 12.5%"]
    display.close()
    os.close(write)
    os.close(read)


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
    for part in (
        "update 3/100",
        "micro-step 1/2",
        "loss 2.5000",
        "val 2.2500",
        "lr 1.00e-03",
        "grad norm 0.75",
    ):
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


class Ticks(threading.Event):
    """In the place of the event that closes a display: its thread waits for a tick instead of for
    a time, and notes how long it would have waited."""

    def __init__(self):
        super().__init__()
        self.timeouts, self._tick, self._done = [], threading.Semaphore(0), threading.Semaphore(0)

    def wait(self, timeout=None):
        if self.timeouts:
            self._done.release()
        self.timeouts.append(timeout)
        assert self._tick.acquire(timeout=60)
        return self.is_set()

    def set(self):
        super().set()
        self._tick.release()

    def tick(self):
        """Let the thread go once round."""
        self._tick.release()
        assert self._done.acquire(timeout=60)


@pytest.fixture
def ticks(monkeypatch):
    ticks = Ticks()
    stands_in = SimpleNamespace(Event=lambda: ticks, Thread=threading.Thread)
    monkeypatch.setattr("onelaunch.training.display.threading", stands_in)
    return ticks


def frames(seen: bytearray) -> int:
    return bytes(seen).count(HEADER.title.encode())


def test_a_terminal_is_redrawn_four_times_a_second_whatever_happens_in_between(screen, ticks):
    slave, seen = screen
    display = Display(HEADER, (0, 0), slave)
    for tick in range(1, 4):
        for update in range(100):
            display.progress(tick, update % 2)
            display.push(update_record(update))
        ticks.tick()
        until(lambda tick=tick: frames(seen) == tick)
    display.close(60)
    assert set(ticks.timeouts) == {1 / DRAWS_PER_SECOND} == {0.25}
    until(lambda: "forward 75.0%" in seen.decode())
    assert frames(seen) <= 5  # one of the end, and once more as rich leaves


def test_an_unchanged_panel_is_not_drawn_again(screen, ticks):
    slave, seen = screen
    display = Display(HEADER, (5, 0), slave)
    for _ in range(5):
        ticks.tick()
    display.close(60)
    until(lambda: SHOW_CURSOR in seen)  # the last that is written
    assert frames(seen) <= 2  # the first, and once more as rich leaves


def test_a_terminal_that_stands_still_stops_nobody():
    import pty

    master, slave = pty.openpty()  # nothing reads it
    display = Display(HEADER, (0, 0), slave)
    filler = threading.Thread(target=os.write, args=(slave, b"x" * 1_000_000), daemon=True)
    filler.start()
    time.sleep(0.3)
    for update in range(20_000):  # one that waited for the terminal would do so for ever
        display.push(update_record(update))
        display.notice("line")
    assert display.dropped > 0
    display.close(seconds=0.5)
    assert display._thread.is_alive(), "the terminal was to be stuck"
    os.close(master)  # hangs up: both threads end
    display._thread.join(10)
    assert not display._thread.is_alive()


@pytest.mark.parametrize("n", [1, 2, 7, 100, 5000])
def test_sparkline_fits_and_spans(n):
    line = sparkline([float(n - i) for i in range(n)], 40)
    assert len(line) == min(n, 40)
    if n > 1:
        assert (line[0], line[-1]) == (chr(0x2588), chr(0x2581))
