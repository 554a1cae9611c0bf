"""Clocks for the parts of a micro-step.

Through ML Programs one thread does everything but the products that are the weights' gradients:
parts are its exclusive times, so that they add up. With PyTorch and on our engines they are those
between marks, on CUDA by events.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from onelaunch.bench.studies.ane_mega_kernel.program_training import OPTIMIZER, Driver
from onelaunch.engines.coreml import step_clock
from onelaunch.engines.coreml.package import Type
from onelaunch.engines.coreml.ready import Evaluated, OnOutput
from onelaunch.engines.coreml.step_clock import no_clock
from onelaunch.engines.coreml.training import CoreMLTrainer
from onelaunch.engines.engine import no_mark
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.training.clock import StepClock

WHOLE, UNEXPLAINED = "whole", "unexplained"
DATA = "data"
HEAD = "head: classifier and loss, both ways"
"""Of an engine of ours: the classifier's forward, the loss, and the backward of both."""
OUTSIDE = "outside the compiled step"
"""Of the CPU engine's threads: data, the optimizer step, and what Python does."""
WAITING = "backward: waiting for products"
BESIDE = "beside: weights' gradients"
"""What another thread computes meanwhile: no part of the sum."""
PRODUCTS = frozenset(("conv", "matmul", "einsum"))
MOVES = frozenset(
    ("concat", "split", "slice_by_size", "transpose", "reshape", "expand_dims", "gather", "cast",
     "identity")
)  # fmt: skip
OF_CLOCK = {
    step_clock.PROGRAMS_WAIT: "waiting for programs",
    step_clock.FORWARD: "forward: rows and taps",
    step_clock.LOSS: "forward: norm and loss",
    step_clock.CLASSIFIER: "forward: classifier",
    step_clock.CLASSIFIER_BACKWARD: "backward: classifier",
    step_clock.BACKWARD: "backward: copies and sums",
    step_clock.SUMS: "backward: copies and sums",
    step_clock.PRODUCTS_WAIT: WAITING,
}
"""The parts that the trainer names."""
EVALUATING = ("products", "elementwise", "moves", "rounding", "interpreting")
"""What the evaluation of a program is made of."""
Seconds = dict[str, float]


def kind_of(operation: str) -> str:
    """The entry of EVALUATING that an operation of a program counts as."""
    if operation in PRODUCTS:
        return "products"
    return "moves" if operation in MOVES else "elementwise"


class Parts:
    """Exclusive seconds by name of what one thread does; what is begun inside something else is
    not counted there."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.in_background = 0.0
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile under a name."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def switch(self, name: str) -> None:
        """Continue the open part under another name."""
        self._count()
        self._open[-1] = name

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """The trainer's clock, by its names."""
        if part != step_clock.PRODUCTS:
            with self.part(OF_CLOCK[part]):
                yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.in_background += time.perf_counter() - start

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


class Timed:
    """An evaluated program whose time is counted: inputs brought to its precision, then by kinds of
    operations, by their rounding, and what finding operands and keeping results takes."""

    def __init__(self, program: Any, parts: Parts, direction: str) -> None:
        assert isinstance(program, Evaluated), "programs are evaluated"
        self.inputs: Mapping[str, Type] = program.inputs
        self._program, self._parts, self._direction = program, parts, direction
        kinds = {operation.kind for operation in program.evaluator.function.operations}
        self._names = {kind: f"{direction}: {kind_of(kind)}" for kind in kinds}
        self._names |= {kind: f"{direction}: {kind}" for kind in EVALUATING[-2:]}

    def __call__(
        self, inputs: Mapping[str, Tensor], on_output: OnOutput | None = None
    ) -> dict[str, Tensor]:
        names, switch = self._names, self._parts.switch
        evaluator = self._program.evaluator
        evaluator.probe = lambda what: switch(names[what])
        try:
            with self._parts.part(f"{self._direction}: conversions"):
                return self._program(inputs, on_output)
        finally:
            evaluator.probe = None

    def close(self) -> None:
        """The program is its owner's."""


@contextmanager
def program_parts(driver: Driver[CoreMLTrainer]) -> Iterator[Callable[[int, bool], Seconds]]:
    """A call that makes an update of so many micro-steps on the programs that there are, and
    returns what each part took; with clocks off, the whole alone."""
    engine, parts = driver.engine, Parts()
    plain = engine.serving
    assert plain is not None, "a micro-step was made"
    timed = replace(
        plain,
        forward=[Timed(program, parts, "forward") for program in plain.forward],
        backward=[Timed(program, parts, "backward") for program in plain.backward],
    )

    def update(k: int, clocks: bool) -> Seconds:
        parts.seconds.clear()
        parts.in_background = 0.0
        engine.serving = timed if clocks else plain
        engine.clock = parts.clock if clocks else no_clock
        start = time.perf_counter()
        for _ in range(k):
            with parts.part(DATA):
                batch = driver.next_batch()
            engine.train_step(*batch, 1 / k)
        with parts.part(OPTIMIZER):
            driver.step()
        whole = time.perf_counter() - start
        seconds = dict(parts.seconds) if clocks else {}
        if clocks:
            seconds[UNEXPLAINED] = whole - sum(seconds.values())
            seconds[BESIDE] = parts.in_background
        return {name: value / k for name, value in {**seconds, WHOLE: whole}.items()}

    try:
        yield update
    finally:
        engine.serving, engine.clock = plain, no_clock


def programs_of(driver: Driver[CoreMLTrainer]) -> int:
    """The number of programs that a micro-step runs, after the first."""
    serving = driver.engine.serving
    return 0 if serving is None else len(serving.forward) + len(serving.backward)


MARKS = {"forward": "forward: classifier and loss", "backward": "backward: layers"}
"""What the engine's marks end, where the layers' forward and the classifier's backward have marks
of their own."""


@contextmanager
def pytorch_parts(driver: Driver[ReferenceEngine]) -> Iterator[Callable[[int], Seconds]]:
    """A call that makes an update of so many micro-steps and returns what each part took."""
    engine, clock = driver.engine, StepClock(driver.engine.device)
    model: Any = engine.model
    hidden = model.hidden

    def marked(*args: Any) -> Tensor:
        rows: Tensor = hidden(*args)
        clock.mark("forward: layers")
        if rows.requires_grad:
            rows.register_hook(lambda gradient: clock.mark("backward: classifier and loss"))
        return rows

    def update(k: int) -> Seconds:
        driver.wait()
        clock.begin()
        for _ in range(k):
            batch = driver.next_batch()
            clock.mark(DATA)
            engine.train_step(*batch, 1 / k, lambda part, seconds=None: clock.mark(MARKS[part]))
        driver.step()
        clock.mark(OPTIMIZER)
        return _by_part(clock.end(), k)

    model.hidden = marked
    try:
        yield update
    finally:
        del model.hidden


BACKWARD = {"cpu": "backward: layers, and calling the step", "cuda": "backward: layers"}
"""What an engine's mark of the backward ends: on the CPU engine one call does all three parts, and
what Python takes for it is counted here."""


def engine_parts(driver: Driver[ReferenceEngine], k: int, marks: bool) -> tuple[Seconds, Seconds]:
    """An update of so many micro-steps: what each part took, without marks the whole alone; and, on
    the CPU engine, what all its threads together did."""
    engine = driver.engine
    engine.telemetry()
    driver.wait()
    clock = StepClock(engine.device)
    backward = BACKWARD[engine.describe()["engine"]]
    names = {"forward": "forward: layers", "loss": HEAD, "backward": backward}

    def mark(part: str, seconds: float | None = None) -> None:
        clock.mark(names[part], seconds)

    for _ in range(k):
        batch = driver.next_batch()
        if marks:
            clock.mark(DATA)
        engine.train_step(*batch, 1 / k, mark if marks else no_mark)
    driver.step()
    engine.after_update()
    if marks:
        clock.mark(OPTIMIZER)
    seconds = _by_part(clock.end(), k)
    by_kind = engine.telemetry().get("thread_seconds", {})
    threads = {kind.replace("_", " "): value / k for kind, value in by_kind.items()}
    return seconds if marks else {WHOLE: seconds[WHOLE]}, threads


def _by_part(seconds: dict[str, float], k: int) -> Seconds:
    """A clock's parts that took any time, for one of k micro-steps."""
    seconds[WHOLE] = seconds.pop("wall")
    return {name: value / k for name, value in seconds.items() if value or name == UNEXPLAINED}
