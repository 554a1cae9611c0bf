"""Microseconds of a forward on a device, and kernels compiled several at a time."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.compilation.child import usable_cores
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.calls import on
from onelaunch.engines.cuda.forms import Form, bind
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import Shape, limits_of
from onelaunch.engines.cuda.tuning.facts import Facts, device_facts
from onelaunch.engines.cuda.tuning.search import (
    COMPILING,
    Job,
    Progress,
    Search,
    ignore_progress,
)
from onelaunch.engines.cuda.tuning.store import Choice, bucket, facts_of
from onelaunch.errors import RunFailed
from onelaunch.operators.triton_cache import verified

SLICE_US = 5000.0
"""What one sample takes, one forward at least."""
SAMPLES = 5
MOST_APART, ROWS_COMPARED = 0.05, 256
"""A form whose logits are further than that from the rule's, in some of the rows, is wrong."""
HOPELESS = 1.25  # of the least time so far: one sample is enough then
TIMEOUT_NS = 50_000_000  # no form is worth choosing whose waits take so long
MAX_COMPILERS = 16


def facts(config: ModelConfig, packed: PackedModel, batch: int, sequence: int) -> Facts:
    """All that a choice for a shape depends on."""
    embedding = packed.embedding
    dtype = str(embedding.dtype).removeprefix("torch.")
    return facts_of(config, dtype, batch, sequence, device_facts(embedding.device))


def tune(
    config: ModelConfig,
    packed: PackedModel,
    batch: int,
    sequence: int,
    progress: Progress = ignore_progress,
) -> Choice:
    """Measure the forms of a shape, logits of every position in the model's dtype, at the size that
    its choice is for, and give the fastest. Nobody else may use the device meanwhile. Raises
    RunFailed where nothing runs."""
    device, dtype = packed.embedding.device, packed.embedding.dtype
    batch, sequence = bucket(config, batch, sequence)
    shape = Shape(batch, sequence, True, dtype)
    return Search(
        config,
        batch,
        sequence,
        dtype.itemsize,
        Compiler(config, packed, sequence, progress),
        Timer(config, packed, shape),
        limits=limits_of(device),
        progress=progress,
    ).run()


class Compiler:
    """Compiles jobs, several at a time, into Triton's store. What cannot be compiled is left out:
    timing it raises the error."""

    def __init__(
        self, config: ModelConfig, packed: PackedModel, sequence: int, progress: Progress
    ) -> None:
        self._config, self._packed, self._progress = config, packed, progress
        # one text: kernels are the same for any number of rows
        self._shape = Shape(1, sequence, True, packed.embedding.dtype)

    def __call__(self, jobs: Sequence[Job]) -> None:
        # Triton's mode stays set where an interrupt ends it: in a context of its own it does not
        contextvars.copy_context().run(self._compile, jobs)

    def _compile(self, jobs: Sequence[Job]) -> None:
        from triton import AsyncCompileMode

        with ThreadPoolExecutor(min(MAX_COMPILERS, max(2, usable_cores() - 1))) as pool, verified:
            counted = _Counting(pool, self._progress)
            try:
                with AsyncCompileMode(counted, ignore_errors=True) as mode:
                    try:
                        for job in jobs:
                            with suppress(Exception):  # whatever Triton raises
                                for call in self._calls(job):
                                    call.compile()
                    except BaseException:  # interrupted: its end would wait for all of them
                        mode.raw_futures.clear()
                        raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _calls(self, job: Job) -> Iterator[Any]:
        """The calls of a job whose kernels differ: a kind's are the same in every layer."""
        bound = bind(self._config, self._packed, self._shape, job.form)
        kinds = [stage.kind for stage in bound.plan.stages]
        if len(bound.calls) < len(kinds):  # a launch holds several stages
            yield bound.calls[0]
            return
        first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
        for kind, number in first.items():
            if job.kind is None or kind == job.kind:
                yield bound.calls[number]


class _Counting(Executor):
    """An executor that reports how many of its tasks are done."""

    def __init__(self, pool: Executor, progress: Progress) -> None:
        self._pool, self._progress = pool, progress
        self._futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._pool.submit(fn, *args, **kwargs)
        self._futures.append(future)
        future.add_done_callback(self._report)
        return future

    def _report(self, future: Future[Any]) -> None:
        done = sum(each.done() for each in self._futures)
        self._progress(COMPILING, done, len(self._futures))


class Timer:
    """Microseconds of a form: the median of some samples, each of graph replays back to back; inf
    for one that does not run, or whose logits are wrong. Raises RunFailed where nothing runs any
    more. The first form must be the rule's."""

    def __init__(self, config: ModelConfig, packed: PackedModel, shape: Shape) -> None:
        self._config, self._packed, self._shape = config, packed, shape
        self._device = packed.embedding.device
        self._least = math.inf
        rows = shape.batch * shape.sequence
        self._tokens = torch.randint(config.vocab_size, (rows,), device=self._device)
        self._every = -(-rows // ROWS_COMPARED)
        self._expected: Tensor | None = None

    def __call__(self, form: Form) -> float:
        try:
            with on(self._device):
                us = self._median(form)
        except torch.OutOfMemoryError as error:
            raise RunFailed(in_a_line(error)) from error
        except Exception as error:  # a tile too large, programs that do not fit, a timeout
            self._check_device(form, error)
            return math.inf
        self._least = min(self._least, us)
        return us

    def _check_device(self, form: Form, error: Exception) -> None:
        """Raise RunFailed where nothing will run any more: then all that follows would look slow,
        and what is left of a search is no choice."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as gone:
            raise RunFailed(f"{form.name} broke the device: {in_a_line(error)}") from gone

    def _median(self, form: Form) -> float:
        bound = bind(self._config, self._packed, self._shape, form, TIMEOUT_NS)
        bound.buffers.tokens.copy_(self._tokens)
        bound.buffers.logits.fill_(math.nan)
        graph = bound.captured()
        replay_us(graph, 1)  # the first brings the graph to the device
        self._compare(bound.buffers.logits[:: self._every].float())
        n = max(1, int(SLICE_US / replay_us(graph, 1)))
        samples: list[float] = []
        while len(samples) < SAMPLES:
            samples.append(replay_us(graph, n))
            if samples[0] > HOPELESS * self._least:
                break
        bound.check()
        return sorted(samples)[len(samples) // 2]

    def _compare(self, logits: Tensor) -> None:
        """Raise RunFailed where logits are not those of the rule's, which came first."""
        if self._expected is None:
            self._expected = logits
        apart = float((logits - self._expected).norm() / self._expected.norm())
        if not apart < MOST_APART:
            raise RunFailed(f"logits {apart:.1%} from the rule's")


def replay_us(graph: torch.cuda.CUDAGraph, n: int) -> float:
    """Microseconds a replay, of `n` back to back on the current device, by two events."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(n):
        graph.replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3 / n
