"""weight-mutability on a GPU, where a kernel's weights are what lies in a buffer.

A model's forward, one kernel per stage, as a CUDA graph: new weights packed into the buffers that
it was captured with, and into others; a small kernel whose scale is a constant of its compilation;
and PyTorch called operator by operator. Every result is compared with float64 and the weights it
should have, two sets in turn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onelaunch.bench.core.gpu_forwards import Sample, calls, replays
from onelaunch.bench.core.record import Row
from onelaunch.bench.core.rounds import digest, in_rounds
from onelaunch.bench.core.timing import milliseconds, synchronizer
from onelaunch.bench.core.weights import exact_logits, random_weights
from onelaunch.bench.studies.ane_mega_kernel.weight_mutability import views
from onelaunch.config import preset
from onelaunch.engines.cuda.calls import on
from onelaunch.engines.cuda.pack import PackedModel, pack
from onelaunch.engines.cuda.program import BoundForward, Shape
from onelaunch.errors import RunFailed
from onelaunch.model import Model

DTYPE = torch.bfloat16
SEEDS = (1, 2)
CHANGES, QUICK_CHANGES = 15, 5
ROUNDS, QUICK_ROUNDS = 25, 9
SIZE, BLOCK = 1 << 16, 1 << 10
"""Numbers that the small kernel scales, and how many of them a program."""


class Way(NamedTuple):
    """A row's notes of one, and a sample of running it, in microseconds."""

    notes: dict[str, Any]
    sample: Sample


def rows(device: torch.device, quick: bool) -> list[Row]:
    """A row of each way."""
    changes = QUICK_CHANGES if quick else CHANGES
    with on(device), torch.no_grad():
        forward = _Forward(device)
        ways = {
            views.ARGUMENTS: _same_buffers(forward, changes),
            views.OTHERS: _other_buffers(forward, changes),
            views.CONSTEXPR: _constant(device, changes),
            views.EAGER: _parameters(forward, changes),
        }
        samples = in_rounds(
            {case: way.sample for case, way in ways.items()}, QUICK_ROUNDS if quick else ROUNDS
        )
    return [
        Row.of(case, [us / 1e3 for us in samples[case]], notes=way.notes)
        for case, way in ways.items()
    ]


class _Forward:
    """A model with two sets of weights, a sequence, and its logits in float64 with either."""

    def __init__(self, device: torch.device) -> None:
        self.config, self.device = preset(views.MODEL), device
        generator = torch.Generator().manual_seed(SEEDS[0])
        tokens = torch.randint(self.config.vocab_size, (1, views.TOKENS), generator=generator)
        self.weights, self._exact = [], []
        for seed in SEEDS:
            made = random_weights(self.config, seed)
            self._exact.append(exact_logits(self.config, made, tokens)[0])
            self.weights.append({n: w.to(device) for n, w in made.items()})
        self.tokens_BS = tokens.to(device)

    def pack(self, which: int) -> PackedModel:
        """A set of weights for the engine's kernels, in buffers of its own."""
        return pack(self.config, self.weights[which], DTYPE, self.device)

    def bind(self, packed: PackedModel) -> BoundForward:
        """The forward of the sequence."""
        bound = BoundForward(self.config, packed, Shape(1, views.TOKENS, True, DTYPE), {})
        bound.buffers.tokens.copy_(self.tokens_BS.flatten())
        return bound

    def apart(self, logits: Tensor, which: int) -> float:
        """The error of logits, (S, V), against float64 with a set of weights."""
        exact = self._exact[which]
        return float((logits.double().cpu() - exact).norm() / exact.norm())


def _same_buffers(forward: _Forward, changes: int) -> Way:
    packed = forward.pack(0)
    bound = forward.bind(packed)
    graph = bound.captured()
    kernels = [call.compile() for call in bound.calls]

    def change(which: int) -> None:
        for name, fresh in vars(forward.pack(which)).items():
            if fresh is not None:
                getattr(packed, name).copy_(fresh)

    took, error = _followed(forward, change, lambda: _replayed(bound, graph), changes)
    now = [call.compile() for call in bound.calls]
    notes = _notes("the CUDA engine's kernels", error) | {
        "compiled_anew": any(a is not b for a, b in zip(kernels, now, strict=True)),
        "change_ms": digest(took),
    }
    return Way(notes, replays(graph, bound))


def _other_buffers(forward: _Forward, changes: int) -> Way:
    """The first buffers stay, so that the graph captured with them reads what is there."""
    bound = first = forward.bind(forward.pack(0))
    graph = first_graph = first.captured()
    captures: list[float] = []

    def change(which: int) -> None:
        nonlocal bound, graph
        bound = forward.bind(forward.pack(which))
        start = time.perf_counter()
        graph = bound.captured()
        synchronizer(forward.device)()
        captures.append(1e3 * (time.perf_counter() - start))

    took, error = _followed(forward, change, lambda: _replayed(bound, graph), changes)
    change(1)
    stale = _replayed(first, first_graph)
    follows = forward.apart(stale, 1) < views.MOST_APART_BFLOAT16
    if not follows and not forward.apart(stale, 0) < views.MOST_APART_BFLOAT16:
        raise RunFailed(
            "a graph computes neither with the weights it was captured with nor new ones"
        )
    notes = _notes("the CUDA engine's kernels", error) | {
        "follows": follows,
        "follows_loaded_anew": error < views.MOST_APART_BFLOAT16,
        "compiled_anew": False,
        "change_ms": digest(took),
        "convert_ms": digest(captures[1 : changes + 1]),
    }
    return Way(notes, replays(graph, bound))


def _parameters(forward: _Forward, changes: int) -> Way:
    placed = {name: w.to(DTYPE, copy=True) for name, w in forward.weights[0].items()}
    model = Model.from_weights(forward.config, placed)

    def change(which: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(forward.weights[which][name])

    def run() -> Tensor:
        return model(forward.tokens_BS)[0]

    took, error = _followed(forward, change, run, changes)
    notes = _notes("PyTorch", error) | {"compiled_anew": False, "change_ms": digest(took)}
    return Way(notes, calls(run))


def _followed(
    forward: _Forward, change: Callable[[int], None], run: Callable[[], Tensor], changes: int
) -> tuple[list[float], float]:
    """Milliseconds of changes, the weights of the second set first, without the first change, which
    allocates memory; and the largest error of a result after a change, and before the first."""
    took, errors = [], [forward.apart(run(), 0)]
    for number in range(changes + 1):
        which = 1 - number % 2
        took.append(milliseconds(partial(change, which), synchronizer(forward.device)))
        errors.append(forward.apart(run(), which))
    return took[1:], _largest(errors)


def _replayed(bound: BoundForward, graph: torch.cuda.CUDAGraph) -> Tensor:
    bound.buffers.logits.fill_(torch.nan)
    graph.replay()
    return bound.buffers.logits.clone()


@triton.jit
def _scale(x_ptr, y_ptr, SCALE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, SCALE * tl.load(x_ptr + at))


def _constant(device: torch.device, changes: int) -> Way:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.empty_like(x)
    took, errors, kernels = [], [], []
    # a store of its own: what an earlier run has compiled is not there
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        for number in range(changes + 1):
            scale = number + 0.5

            def run(scale: float = scale) -> None:
                _scale[(SIZE // BLOCK,)](x, y, SCALE=scale, BLOCK=BLOCK)

            y.fill_(torch.nan)
            took.append(milliseconds(run, synchronizer(device)))
            exact = scale * x.double()
            errors.append(float((y.double() - exact).norm() / exact.norm()))
            kernels.append(_compiled(x, y, scale))
    notes = _notes("a kernel that scales numbers", _largest(errors), views.MOST_APART) | {
        "compiled_anew": len(set(map(id, kernels))) == len(kernels),
        "convert_ms": digest(took[1:]),  # the first one compiles what launches it, too
    }
    return Way(notes, calls(run))


def _compiled(x: Tensor, y: Tensor, scale: float) -> Any:
    """The small kernel's binary for a scale, which was launched with it before."""
    return _scale.warmup(x, y, SCALE=scale, BLOCK=BLOCK, grid=(SIZE // BLOCK,))


def _notes(by: str, error: float, most: float = views.MOST_APART_BFLOAT16) -> dict[str, Any]:
    return {"converts": True, "by": by, "follows": error < most, "error": float(f"{error:.1e}")}


def _largest(errors: list[float]) -> float:
    """nan where one of them is."""
    return float(torch.tensor(errors).max())
