"""Clocks for the parts of a micro-step, put around a trainer from outside.

Through ML Programs one thread does everything but the products that are the weights' gradients:
parts are its exclusive times, so that they add up. With PyTorch they are those between marks, on
CUDA by events.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.studies.ane_mega_kernel.program_training import Driver
from onelaunch.engines.coreml import training
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.training import CoreMLTrainer, Loaded
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.training.clock import StepClock

WHOLE, UNEXPLAINED = "whole", "unexplained"
DATA, OPTIMIZER = "data", "optimizer"
WAITING = "backward: waiting for products"
BESIDE = "beside: weights' gradients"
"""What another thread computes meanwhile: no part of the sum."""
PRODUCTS = frozenset(("conv", "matmul", "einsum"))
MOVES = frozenset(
    ("concat", "split", "slice_by_size", "transpose", "reshape", "expand_dims", "gather", "cast",
     "identity")
)  # fmt: skip
EVALUATING = ("products", "elementwise", "moves", "rounding", "interpreting")
"""What the evaluation of a program is made of."""
Seconds = dict[str, float]


def kind_of(operation: str) -> str:
    """Which of EVALUATING an operation of a program counts as."""
    if operation in PRODUCTS:
        return "products"
    return "moves" if operation in MOVES else "elementwise"


class Parts:
    """Exclusive seconds by name of what one thread does; what is begun inside something else is
    not counted there."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.beside = 0.0
        self._open: list[str] = []
        self._last = 0.0

    def enter(self, name: str) -> None:
        self._count()
        self._open.append(name)

    def switch(self, name: str) -> None:
        """What is open goes on under another name."""
        self._count()
        self._open[-1] = name

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, counted."""

        def counted(*given: Any, **named: Any) -> Any:
            self.enter(name)
            try:
                return call(*given, **named)
            finally:
                self.leave()

        return counted

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now


class Watched:
    """An evaluator whose time is counted: inputs brought to its precision, then by kinds of
    operations, by their rounding, and what finding operands and keeping results takes."""

    def __init__(self, evaluator: Evaluator, parts: Parts, direction: str) -> None:
        self.function = evaluator.function
        self._evaluator = watched = copy.copy(evaluator)
        self._parts, self._direction = parts, direction
        names = {kind: f"{direction}: {kind}" for kind in EVALUATING}
        operands, rounded, switch = evaluator._operands, evaluator._rounded, parts.switch
        began = False

        def found(operation: Any, values: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal began
            if not began:
                switch(names["interpreting"])
                began = True
            given = operands(operation, values)
            switch(names[kind_of(operation.kind)])
            return given

        def kept(value: Tensor) -> Tensor:
            if not began:  # an input
                return rounded(value)
            switch(names["rounding"])
            result = rounded(value)
            switch(names["interpreting"])
            return result

        def begin() -> None:
            nonlocal began
            began = False

        self._begin = begin
        watched._operands, watched._rounded = found, kept  # type: ignore[method-assign]

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._begin()
        self._parts.enter(f"{self._direction}: conversions")
        try:
            return self._evaluator(given)
        finally:
            self._parts.leave()


@contextmanager
def program_parts(driver: Driver[CoreMLTrainer]) -> Iterator[Callable[[int, bool], Seconds]]:
    """A call that makes an update of so many micro-steps on the programs that there are, and says
    what each part took; told not to look, it gives the whole alone."""
    engine, parts = driver.engine, Parts()
    plain = engine._loaded()
    watched = _watched(plain, parts)
    with ExitStack() as changes:
        for name, part in (
            ("_loaded", "waiting for programs"),
            ("_forward", "forward: rows and taps"),
            ("_end", "forward: norm and loss"),
            ("_backward", "backward: copies and sums"),
            ("_awaited", WAITING),
            ("_add", "backward: copies and sums"),
            ("_add_embedding", "backward: copies and sums"),
        ):
            call = getattr(engine, name)
            call = _classifier_apart(call, parts) if name == "_end" else call
            changes.enter_context(_swapped(engine, name, parts.around(part, call)))
        for name in ("_all_finite", "_loss_scale"):
            call = parts.around("backward: copies and sums", getattr(training, name))
            changes.enter_context(_swapped(training, name, call))
        changes.enter_context(_swapped(engine, "_products", _timed_products(engine, parts)))

        def update(k: int, look: bool) -> Seconds:
            parts.seconds.clear()
            parts.beside = 0.0
            engine._serving = watched if look else plain
            start = time.perf_counter()
            for _ in range(k):
                parts.enter(DATA)
                texts = driver.texts()
                parts.leave()
                engine.train_step(*texts, 1 / k)
            parts.enter(OPTIMIZER)
            driver.optimizer.step()
            driver.optimizer.zero_grad()
            parts.leave()
            whole = time.perf_counter() - start
            found = dict(parts.seconds) if look else {}
            if look:
                found[UNEXPLAINED] = whole - sum(found.values())
                found[BESIDE] = parts.beside
            return {name: value / k for name, value in {**found, WHOLE: whole}.items()}

        try:
            yield update
        finally:
            engine._serving = plain


def _watched(loaded: Loaded, parts: Parts) -> Loaded:
    watched: dict[str, Any] = {
        direction: [Watched(each, parts, direction) for each in getattr(loaded, direction)]
        for direction in ("forward", "backward")
    }
    return replace(loaded, **watched)


def _classifier_apart(end: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """The product with the classifier, and its gradients', told apart from norm and loss."""

    def told(*given: Any) -> Any:
        linear = parts.around("forward: classifier", F.linear)
        grad = parts.around("backward: classifier", torch.autograd.grad)
        with _swapped(F, "linear", linear), _swapped(torch.autograd, "grad", grad):
            return end(*given)

    return told


def _timed_products(engine: CoreMLTrainer, parts: Parts) -> Callable[..., Any]:
    made = engine._products

    def timed(product: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            start = time.perf_counter()
            try:
                return product()
            finally:
                parts.beside += time.perf_counter() - start

        return call

    def products(layer: int, known: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {name: timed(product) for name, product in made(layer, known).items()}

    return products


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


MARKS = {"forward": "forward: classifier and loss", "backward": "backward: layers"}
"""What the engine's marks end, where the layers' forward and the classifier's backward have marks
of their own."""


@contextmanager
def pytorch_parts(driver: Driver[ReferenceEngine]) -> Iterator[Callable[[int], Seconds]]:
    """A call that makes an update of so many micro-steps and says what each part took."""
    engine, clock = driver.engine, StepClock(driver.engine.device)
    hidden = engine.model.hidden

    def marked(*given: Any) -> Tensor:
        rows = hidden(*given)
        clock.mark("forward: layers")
        if rows.requires_grad:
            rows.register_hook(lambda gradient: clock.mark("backward: classifier and loss"))
        return rows

    def update(k: int) -> Seconds:
        driver.wait()
        clock.begin()
        for _ in range(k):
            tokens, targets = (each.to(engine.device) for each in driver.texts())
            clock.mark(DATA)
            engine.train_step(tokens, targets, 1 / k, lambda part: clock.mark(MARKS[part]))
        driver.optimizer.step()
        driver.optimizer.zero_grad()
        clock.mark(OPTIMIZER)
        found = clock.end()
        found[WHOLE] = found.pop("wall")
        return {name: value / k for name, value in found.items() if value or name == UNEXPLAINED}

    with _swapped(engine.model, "hidden", marked):
        yield update
