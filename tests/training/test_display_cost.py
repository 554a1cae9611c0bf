"""What being watched costs a training step, and what a line each update does: these compare times,
so they are the soak's. That the display draws four times a second at most is in test_display.py."""

import time

import pytest

from onelaunch.bench.core.rig import trainer as bench_trainer
from onelaunch.bench.studies.ane_mega_kernel import terminal_io
from onelaunch.bench.studies.ane_mega_kernel.terminal_io import (
    BYTES_PER_SECOND,
    terminal,
    watch,
)
from onelaunch.training.display import Display, Header
from onelaunch.training.flops import TrainingFlops
from onelaunch.training.recipe import Recipe

pytestmark = pytest.mark.soak

FLOPS = TrainingFlops(per_token=10**6)
HEADER = Header("onelaunch train: runs/x", ("model  m", "data   d"), 100, 2, 64, FLOPS)
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
    small = Recipe().with_settings(SMALL, "test")
    with bench_trainer(small, "cpu") as trainer, terminal(BYTES_PER_SECOND) as descriptor:
        worked = time.thread_time()
        samples = watch(trainer, descriptor, blocks=0, seconds=0.1, naive_updates=330)
        worked = time.thread_time() - worked
    took = 330 * samples["naive"][0] / 1e3
    assert took > 2.0, "330 lines of some 60 bytes at 4,000 a second, less what is buffered"
    assert took > 1.5 * worked
