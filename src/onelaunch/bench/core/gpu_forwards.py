"""What the experiments with whole forwards on a GPU share: random weights, PyTorch's forms of a
forward, and samples of what is replayed and of what is called.

A sample of a CUDA graph is a replay's time, of replays back to back, by two events. What is no
graph is timed by the host's clock over calls back to back with one wait at the end; PyTorch's forms
without a graph are timed alone, in the host's quiet moments (settled.py). All times are
microseconds a forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from onelaunch.bench.peers.forward import BareForward
from onelaunch.config import ModelConfig

SAMPLE_US = 4000.0
EAGER_CALLS, WALL_CALLS = 10, 400
DEVIATION = 0.02

Sample = Callable[[], float]


def random_weights(
    config: ModelConfig, device: torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    """Matrices at random, norms of ones, float32, as checkpoints name them."""
    return {
        name: torch.randn(shape, device=device, generator=generator) * DEVIATION
        if len(shape) > 1
        else torch.ones(shape, device=device)
        for name, shape in config.weight_shapes().items()
    }


class OfPyTorch(NamedTuple):
    """PyTorch's forward as it is and through torch.compile: what is a CUDA graph, to be sampled
    among others; what is launched from Python, to be timed alone; and the seconds to
    torch.compile's first result."""

    graphs: dict[str, Sample]
    launched: dict[str, Sample]
    seconds: float


def pytorch_samples(bare: BareForward, tokens_BS: Tensor) -> OfPyTorch:
    """Samples of PyTorch's forms of a forward."""
    compiled = torch.compile(bare.__call__, dynamic=False, mode="default")
    start = time.perf_counter()
    compiled(tokens_BS)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    graphs = {
        "eager + graph": replays(captured(lambda: bare(tokens_BS)), None),
        "torch.compile + graph": replays(captured(lambda: compiled(tokens_BS)), None),
    }
    launched = {
        "eager": calls(lambda: bare(tokens_BS)),
        "torch.compile": calls(lambda: compiled(tokens_BS)),
    }
    return OfPyTorch(graphs, launched, seconds)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replays(graph: torch.cuda.CUDAGraph, owner: object) -> Sample:
    """Microseconds a replay. `owner` has the graph's buffers, and is kept."""
    from onelaunch.engines.cuda.tuning.timer import replay_us

    replay_us(graph, 3)
    n = max(5, int(SAMPLE_US / replay_us(graph, 5)))

    def sample(owner: object = owner) -> float:
        return replay_us(graph, n)

    return sample


def walls(call: Callable[[], object]) -> Sample:
    """Microseconds a call by the host's clock, of WALL_CALLS back to back and one wait."""
    for _ in range(3):
        call()  # launched, captured, replayed
    return calls(call, WALL_CALLS)


def calls(call: Callable[[], object], n: int = EAGER_CALLS) -> Sample:
    """Microseconds a call, the host's part with it, of `n` back to back."""

    def sample() -> float:
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6 / n

    return sample
