"""Forms on a device: made, timed, and one of them chosen and kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.calls import on
from onelaunch.engines.cuda.choice import STAGED, Choice, Facts, bucket, facts_of, keep
from onelaunch.engines.cuda.compilers import Compilers, Subject, how_many
from onelaunch.engines.cuda.measure import SECONDS, Candidate, Measurement
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import TIMEOUT_NS as PATIENCE
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape, limits_of
from onelaunch.errors import RunFailed

Turn = Callable[[], AbstractContextManager[None]]
SLICE_US = 5000.0
"""What one sample takes, one forward at least, and so about how long a caller waits for it."""
SAMPLES = 5
MOST_APART, ROWS_COMPARED = 0.05, 256
"""A candidate whose logits are further than that from the rule's, in some of the rows, is wrong."""
HOPELESS = 1.25  # of the least time so far: one sample is enough then
LITTLE_PATIENCE = 50_000_000  # nanoseconds: nothing is measured that waits so long


def bind(
    config: ModelConfig,
    packed: PackedModel,
    shape: Shape,
    choice: Choice | Candidate,
    patience: int = PATIENCE,
) -> BoundForward:
    """The forward of a choice, or of a candidate."""
    if choice.form == STAGED:
        return BoundForward(config, packed, shape, choice.blockings)
    return FusedForward(
        config, packed, shape, choice.blockings, choice.form, choice.programs, patience
    )


@cache
def device_facts(device: torch.device) -> dict[str, str | int]:
    """What a choice depends on of a device, and of what compiles for it."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
    }


def facts(config: ModelConfig, packed: PackedModel, batch: int, sequence: int) -> Facts:
    """All that a choice for a shape depends on."""
    embedding = packed.embedding
    dtype = str(embedding.dtype).removeprefix("torch.")
    return facts_of(config, dtype, batch, sequence, device_facts(embedding.device))


def choose(
    config: ModelConfig,
    packed: PackedModel,
    batch: int,
    sequence: int,
    store: Store,
    seconds: float = SECONDS,
) -> Choice:
    """Measure the forms of a shape in this process, where nobody else uses the device meanwhile,
    and keep the answer. Raises RunFailed where nothing runs."""
    choice = measured(config, packed, batch, sequence, seconds=seconds)
    keep(store, facts(config, packed, batch, sequence), choice)
    return choice


def measured(
    config: ModelConfig,
    packed: PackedModel,
    batch: int,
    sequence: int,
    turn: Turn = nullcontext,
    seconds: float = SECONDS,
) -> Choice:
    """The fastest form of a shape, logits of every position in the model's dtype, at the size that
    its choice is for. Whatever is timed is timed in a `turn`. Raises RunFailed where nothing
    runs."""
    device, dtype = packed.embedding.device, packed.embedding.dtype
    of_batch, of_sequence = bucket(config, batch, sequence)
    subject = Subject(config, str(dtype).removeprefix("torch."), device.index)
    free, _ = torch.cuda.mem_get_info(device)
    count = how_many(config, of_batch * of_sequence, dtype.itemsize, free)
    compilers = Compilers(subject, count)
    timer = Timer(config, packed, Shape(of_batch, of_sequence, True, dtype), turn)
    try:
        return Measurement(
            config,
            of_batch,
            of_sequence,
            dtype.itemsize,
            compilers.compile,
            timer,
            limits=limits_of(device),
            seconds=seconds,
        ).run()
    finally:
        compilers.close()


class Timer:
    """Microseconds of a candidate: the median of some samples, each of graph replays back to back
    in a turn of its own; inf for one that does not run, or whose logits are wrong. Raises RunFailed
    where nothing runs any more. The first candidate must be the rule."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        turn: Turn = nullcontext,
    ) -> None:
        self._config, self._packed, self._shape = config, packed, shape
        self._turn = turn
        self._device = packed.embedding.device
        self._least = math.inf
        rows = shape.batch * shape.sequence
        self._tokens = torch.randint(config.vocab_size, (rows,), device=self._device)
        self._every = -(-rows // ROWS_COMPARED)
        self._expected: Tensor | None = None

    def __call__(self, candidate: Candidate) -> float:
        try:
            with on(self._device):
                us = self._median(candidate)
        except torch.OutOfMemoryError as error:
            raise RunFailed(in_a_line(error)) from error
        except Exception as error:  # a tile too large, programs that do not fit, a wait given up
            self._check_device(candidate, error)
            return math.inf
        self._least = min(self._least, us)
        return us

    def _check_device(self, candidate: Candidate, error: Exception) -> None:
        """Raise RunFailed where nothing will run any more: then all that follows would look slow,
        and what is left of a search is no choice."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as gone:
            raise RunFailed(f"{candidate.form} broke the device: {in_a_line(error)}") from gone

    def _median(self, candidate: Candidate) -> float:
        bound = bind(self._config, self._packed, self._shape, candidate, LITTLE_PATIENCE)
        bound.buffers.tokens.copy_(self._tokens)
        bound.buffers.logits.fill_(math.nan)
        with self._turn():
            graph = bound.captured()
        self._sample(graph, 1)  # the first brings the graph to the device
        self._compare(bound.buffers.logits[:: self._every].float())
        n = max(1, int(SLICE_US / self._sample(graph, 1)))
        samples: list[float] = []
        while len(samples) < SAMPLES:
            samples.append(self._sample(graph, n))
            if samples[0] > HOPELESS * self._least:
                break
        bound.check()
        return sorted(samples)[len(samples) // 2]

    def _compare(self, logits: Tensor) -> None:
        """Raise RunFailed where logits are not those of the first candidate, the rule."""
        if self._expected is None:
            self._expected = logits
        apart = float((logits - self._expected).norm() / self._expected.norm())
        if not apart < MOST_APART:
            raise RunFailed(f"logits {apart:.1%} from the rule's")

    def _sample(self, graph: torch.cuda.CUDAGraph, n: int) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with self._turn():
            torch.cuda.synchronize(self._device)
            first.record()
            for _ in range(n):
                graph.replay()
            last.record()
            last.synchronize()
        return float(first.elapsed_time(last)) * 1e3 / n
