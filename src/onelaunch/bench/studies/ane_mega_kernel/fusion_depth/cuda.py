"""fusion-depth on a GPU: a call is a kernel launch.

Random weights in bfloat16; a model computes the logits of every position in bfloat16, a block's
layers give x. All ways of a case launch one kernel, with the stages to run as an argument; embed is
in the first launch of a block's ways. Each way is launched from Python, one launch after another,
and replayed as a CUDA graph; peers are our staged form, which has a kernel for each stage, and for
models PyTorch. Every contestant is sampled once in each round (gpu_forwards.py says what a sample
is), but what PyTorch launches from Python, which is timed alone, in the host's quiet moments
(settled.py). Results are compared before: all ways have the same tiles, and must have the same
bits; the staged form has tiles of its own.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from onelaunch.bench.core.gpu_forwards import (
    Sample,
    calls,
    pytorch_samples,
    random_weights,
    replays,
)
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import Samples, in_rounds
from onelaunch.bench.core.settled import LEAST_WINDOWS, QUICK_WINDOWS, Settled, settle
from onelaunch.bench.peers.forward import BareForward
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cases
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.cuda.calls import Call, CallAndProduct, prefer_shared_memory
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape
from onelaunch.errors import RunFailed
from onelaunch.plan import Launch, Part

BLOCKS = (
    *cases.FFNS,
    cases.Block("attention", 288, 6, 128),
    cases.Block("attention", 768, 12, 128),
)
MODELS = ("stories15m", "stories110m")
QUICK_MODELS = MODELS[:1]
TOKENS = 256
LAYERS_A_LAUNCH = (1, 2, 4, 8)
BY_HALVES = (4, 8)  # as published of stories110m

ROUNDS, QUICK_ROUNDS = 15, 9
DTYPE = torch.bfloat16
MOST_APART = 0.05  # error of ours against PyTorch, and of one launch against the staged form

ONE_BY_ONE, GRAPH = (
    cases.How(words, {"launched": words, "dtype": "bfloat16"}) for words in ("one by one", "graph")
)


class Measured(NamedTuple):
    """What each way took by how it was launched, what the peers took, and notes of the ways."""

    samples: list[tuple[cases.How, Samples]]
    peers: Samples
    alone: dict[str, Settled]
    notes: dict[str, dict[str, float]]


def run_all_on(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case."""
    place = torch.device(device)
    for block in cases.QUICK_FFNS if quick else BLOCKS:
        yield from _rows(block_case(block), block.config, block.part, place, quick, log)
    for name in QUICK_MODELS if quick else MODELS:
        config = preset(name)
        yield from _rows(model_case(name, config), config, "whole", place, quick, log)


def block_case(block: cases.Block) -> cases.Case:
    """One block of each layer."""
    ways = cases.block_ways(block.stages, with_embed=True)
    return cases.Case(block.case, block.name, block.tokens, ways, less=(cases.ONE_LAYER,))


def model_case(name: str, config: ModelConfig) -> cases.Case:
    """A whole model, and its first layers alone: in one launch, some also by halves; embed is in
    the first launch."""
    fewer = [n for n in LAYERS_A_LAUNCH if n < config.n_layers]
    first = {n: "first layer" if n == 1 else f"first {n} layers" for n in (*fewer, config.n_layers)}
    in_one: dict[str, cases.Ranges] = {way: [(0, 1 + 5 * n)] for n, way in first.items()}
    whole = cases.model_ways(config, ["stage", "half", *fewer, "all"])
    halves = [each for each in whole["half"] if each[0] > 0]
    by_halves: dict[str, cases.Ranges] = {
        f"{first[n]} by halves": [(0, halves[0][1]), *halves[1 : 2 * n]]
        for n in BY_HALVES
        if n in fewer
    }
    return cases.Case(
        f"{name} forward 1x{TOKENS}",
        name,
        TOKENS,
        {**whole, **in_one, **by_halves},
        less=(*in_one, *by_halves),
        layers={way: n for n, way in first.items()},
        halves={way.removesuffix(" by halves"): way for way in by_halves},
    )


def _rows(
    case: cases.Case, config: ModelConfig, part: Part, device: torch.device, quick: bool, log: Log
) -> Iterator[Row]:
    generator = torch.Generator(device=device).manual_seed(0)
    weights = random_weights(config, device, generator)
    size = (1, case.tokens)
    tokens_BS = torch.randint(config.vocab_size, size, device=device, generator=generator)
    bare = BareForward(config, weights, DTYPE, device) if part == "whole" else None
    with torch.inference_mode():
        shape = Shape(1, case.tokens, True, DTYPE, part)
        staged = BoundForward(config, pack(config, weights, DTYPE, device), shape, {})
        measured = _measure(case, staged, shape, bare, tokens_BS, quick, log)
    case = replace(case, notes=measured.notes)
    for how, samples in measured.samples:
        yield from cases.rows_of(case, samples, how, measured.peers, measured.alone)
    del weights, staged, bare
    gc.collect()
    torch.cuda.empty_cache()


def _measure(
    case: cases.Case,
    staged: BoundForward,
    shape: Shape,
    bare: BareForward | None,
    tokens_BS: Tensor,
    quick: bool,
    log: Log,
) -> Measured:
    staged.buffers.tokens.copy_(tokens_BS.flatten())
    forms = _forms(case, staged, shape)
    notes = {way: {"apart_from_staged": 0.0} for way in case.ways}
    notes["all"]["compiling_s"] = round(_compiling(forms["all"].calls[0]), 2)
    log(f"{case.name}: its kernel compiled in {notes['all']['compiling_s']} s")
    peers: dict[str, Sample] = {
        "staged": calls(staged.run),
        "staged + graph": replays(staged.captured(), staged),
    }
    launched: dict[str, Sample] = {}
    if bare is not None:
        logits = _result(staged, staged.run, len(staged.calls))
        _check(f"{case.name}, staged", logits, bare(tokens_BS).flatten(0, 1), MOST_APART)
        of_pytorch = pytorch_samples(bare, tokens_BS)
        peers |= of_pytorch.graphs
        launched = of_pytorch.launched
        notes["all"]["torch_compile_s"] = round(of_pytorch.seconds, 2)
        log(f"{case.name}: torch.compile's first forward after {of_pytorch.seconds:.1f} s")
    contestants = dict(peers)
    expected: dict[int, tuple[Tensor, float]] = {}
    for way, fused in forms.items():
        graph, last = fused.captured(), case.ways[way][-1][1]
        if last not in expected:
            expected[last] = _first_of(f"{case.name}, {way}", fused, staged, last)
        result, notes[way]["apart_from_staged"] = expected[last]
        for run in (fused.run, graph.replay):
            _check(f"{case.name}, {way}", _result(fused, run, last), result, 0.0)
        contestants[_named(way, ONE_BY_ONE)] = calls(fused.run)
        contestants[_named(way, GRAPH)] = replays(graph, fused)
    samples = in_rounds(contestants, QUICK_ROUNDS if quick else ROUNDS)
    least = QUICK_WINDOWS if quick else LEAST_WINDOWS
    alone = {peer: settle(sample, least) for peer, sample in launched.items()}
    for fused in forms.values():
        fused.check()  # a forward that timed out is fast
    of_ways = [
        (how, {way: samples[_named(way, how)] for way in case.ways}) for how in (ONE_BY_ONE, GRAPH)
    ]
    return Measured(of_ways, {peer: samples[peer] for peer in peers}, alone, notes)


def _named(way: str, how: cases.How) -> str:
    return f"{way}, {how.words}"


def _forms(case: cases.Case, staged: BoundForward, shape: Shape) -> dict[str, FusedForward]:
    """Every way, with the staged form's weights and tokens."""
    forms = {}
    for way, ranges in case.ways.items():
        held = [Launch(f"stages {first} to {last - 1}", first, last) for first, last in ranges]
        fused = FusedForward(staged.config, staged.packed, shape, {}, held)
        fused.buffers.tokens.copy_(staged.buffers.tokens)
        forms[way] = fused
    return forms


def _compiling(call: Call | CallAndProduct) -> float:
    """Seconds to compile a call's kernel and to load it, none of it being there already."""
    import triton

    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        start = time.perf_counter()
        prefer_shared_memory(call.load())
        return time.perf_counter() - start


def _first_of(
    what: str, fused: FusedForward, staged: BoundForward, last: int
) -> tuple[Tensor, float]:
    """The result of one way that runs the stages up to `last`, and its error against the staged
    form. Other ways must have the same bits."""

    def staged_run() -> None:
        for call in staged.calls[:last]:
            call()

    result = _result(fused, fused.run, last)
    return result, _check(what, result, _result(staged, staged_run, last), MOST_APART)


def _result(bound: BoundForward, run: Callable[[], object], last: int) -> Tensor:
    """The logits, or x where the stages end before head, after a run of stages up to `last`."""
    b, stages = bound.buffers, bound.plan.stages
    b.x.fill_(torch.nan)
    b.logits.fill_(torch.nan)
    run()
    bound.check()
    return (b.logits if stages[last - 1].kind == "head" else b.x).clone()


def _check(what: str, got: Tensor, expected: Tensor, allowed: float) -> float:
    """The error of a result, relative to what is expected. Raises RunFailed where it is more than
    is allowed, or no number."""
    if torch.equal(got, expected):
        return 0.0
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    if not 0 < error <= allowed:
        raise RunFailed(f"{what}: its result is {error:.2g} apart, where {allowed} is allowed")
    return float(f"{error:.2e}")
