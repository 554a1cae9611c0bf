"""parity: how far each engine is from float64, in each precision that it knows on this machine.

Logits of every position of a sequence, random weights, against the same model in float64, compared
with what PyTorch loses in the same precision. The gradients of every parameter against float64
autograd, of training with the reference engine, and on the CPU through ML Programs. On the CPU too
the largest magnitude that each kind of operation of the ML Programs outputs, against float16's end.
Programs are evaluated on the CPU: that is what they mean, not what a Neural Engine computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.core.record import Log, Row, rounded
from onelaunch.bench.core.weights import SEED, exact_logits, random_weights
from onelaunch.bench.engines.parity.views import FLOAT16_END, draw, findings, table
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.coreml.emit import TOKENS, emit, program_launches, save
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.lint import magnitudes
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.package import Package
from onelaunch.engines.engine import Engine
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import MissingExtra
from onelaunch.model import Model
from onelaunch.plan import make_plan

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "relative error"
MODELS = (("stories260k", 128), ("stories15m", 64))
"""And of how many tokens."""
QUICK_MODELS = MODELS[:1]
GRADIENTS = ("stories260k", 64)
"""Of training through ML Programs; with the reference engine all of MODELS."""

Weights = dict[str, Tensor]
Make = Callable[[ModelConfig, Weights], Engine]


class Problem(NamedTuple):
    """A preset with random weights, tokens and targets (1, S)."""

    model: str
    config: ModelConfig
    weights: Weights
    tokens: Tensor
    targets: Tensor


def problem(name: str, sequence: int) -> Problem:
    config = preset(name)
    generator = torch.Generator().manual_seed(SEED)
    tokens, targets = torch.randint(config.vocab_size, (2, 1, sequence), generator=generator)
    return Problem(f"{name} 1x{sequence}", config, random_weights(config), tokens, targets)


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every engine that runs on the device; yields rows."""
    place = torch.device(device)
    programs = place.type == "cpu" and _has_coremltools(log)
    for name, sequence in QUICK_MODELS if quick else MODELS:
        p = problem(name, sequence)
        exact = exact_logits(p.config, p.weights, p.tokens)
        for engine, dtype, make in _engines(place, programs, log):
            logits = make(p.config, dict(p.weights)).logits(p.tokens.to(place)).cpu().double()
            yield _logits_row(p, engine, dtype, logits, _pytorch(p, dtype, place, engine), exact)
        yield from _trained(p, place)
        if programs:
            yield from _magnitudes(p)
    if programs:
        for dtype in ("float32", "float16"):
            yield _by_programs(problem(*GRADIENTS), dtype)


def _engines(place: torch.device, programs: bool, log: Log) -> Iterator[tuple[str, str, Make]]:
    """Engine, precision and its maker, of those that can run here."""
    if place.type == "cuda":
        from onelaunch.engines.cuda.engine import CudaEngine

        for dtype in ("bfloat16", "float16", "float32"):
            yield "cuda", dtype, partial(CudaEngine, device=str(place), dtype=dtype)
        return
    for dtype in ("float32", "bfloat16"):
        yield "reference", dtype, partial(ReferenceEngine, device="cpu", dtype=dtype)
    from onelaunch.engines import cpu

    if reason := cpu.why_not():
        log(f"without the CPU engine: {reason}")
    else:
        for dtype in cpu.DTYPES:
            yield "cpu", dtype, partial(_compiled, dtype=dtype)
    if programs:
        from onelaunch.engines.coreml.engine import CoreMLEngine

        for dtype in ("float32", "float16"):
            yield "coreml", dtype, partial(CoreMLEngine, dtype=dtype)


def _compiled(config: ModelConfig, weights: Weights, dtype: str) -> Engine:
    """The CPU engine, not the one that answers until it is there."""
    from onelaunch.bench.core.compiled import ready
    from onelaunch.engines.cpu.engine import CpuEngine

    return ready(CpuEngine(config, weights, dtype=dtype))


def _has_coremltools(log: Log) -> bool:
    from onelaunch.engines.coreml import coremltools

    try:
        coremltools("bench parity")
    except MissingExtra as error:
        log(f"without ML Programs: {error}")
        return False
    return True


def _pytorch(p: Problem, dtype: str, place: torch.device, engine: str) -> Tensor:
    """Logits by PyTorch with the precision that the engine has: the CPU engine's bfloat16 is its
    weights', an ML Program's weights are float16 always; otherwise `dtype` is the arithmetic's."""
    weights, arithmetic = p.weights, dtype
    if engine == "cpu" and dtype == "bfloat16":
        weights, arithmetic = _stored(weights, torch.bfloat16), "float32"
    elif engine == "coreml":
        weights = _stored(weights, torch.float16)
    model = Model.from_weights(
        p.config, {n: w.to(place, getattr(torch, arithmetic)) for n, w in weights.items()}
    )
    with torch.no_grad():
        logits = F.linear(model.hidden(p.tokens.to(place)), model.head_weight())
    return logits.cpu().double()


def _stored(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: w.to(dtype).to(w.dtype) if w.dim() > 1 else w for name, w in weights.items()}


def _apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def _logits_row(
    p: Problem, engine: str, dtype: str, logits: Tensor, pytorch: Tensor, exact: Tensor
) -> Row:
    by_pytorch = _apart(pytorch, exact)
    return Row(
        f"{p.model} logits, {engine} {dtype}",
        _apart(logits, exact),
        peers={"PyTorch": by_pytorch},
        notes={
            "what": "logits", "model": p.model, "engine": engine, "dtype": dtype,
            "times_pytorch": round(_apart(logits, exact) / by_pytorch, 3),
            "largest": rounded(float((logits - exact).abs().max()), 3),
            "same_argmax": round(float((logits.argmax(-1) == exact.argmax(-1)).double().mean()), 4),
        },
    )  # fmt: skip


def _magnitudes(p: Problem) -> Iterator[Row]:
    """The largest magnitude by kind of operation, in a forward in one program."""
    plan = make_plan(p.config, 1, p.tokens.shape[1], all_positions=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.mlpackage"
        save(emit(plan, program_launches(plan, "all")[0], Packed(p.config, p.weights)), path)
        evaluator = Evaluator(Package(path), "float32", watch=True)
        evaluator({TOKENS: p.tokens})
    beyond = len(magnitudes(evaluator.function, evaluator.largest))
    largest: dict[str, float] = {}
    for operation in evaluator.function.operations:
        value = evaluator.largest.get(operation.name, 0.0)
        largest[operation.kind] = max(largest.get(operation.kind, 0.0), value)
    for kind, value in sorted(largest.items(), key=lambda item: -item[1]):
        if value:
            yield Row(
                f"{p.model} largest of {kind}",
                value,
                notes={
                    "what": "magnitude", "model": p.model, "kind": kind, "unit": "magnitude",
                    "of_float16": rounded(value / FLOAT16_END, 3), "beyond": beyond,
                },
            )  # fmt: skip


def _trained(p: Problem, place: torch.device) -> Iterator[Row]:
    """Gradients of a micro-step as `onelaunch train` takes it, in each precision it has: float32,
    and autocast to bfloat16, the weights in float32; compared with PyTorch's norm in the same."""
    exact = _autograd(p, torch.float64)
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and place.type == "cuda" and not torch.cuda.is_bf16_supported():
            continue
        engine = ReferenceEngine(
            p.config, dict(p.weights), device=str(place), dtype=dtype, train=True, norm="auto"
        )
        engine.train_step(p.tokens, p.targets)
        on_place = p._replace(tokens=p.tokens.to(place), targets=p.targets.to(place))
        pytorch = _autograd(on_place, getattr(torch, dtype))
        grads = _grads(engine.parameters())
        row = _gradients_row(p, "reference", dtype, grads, exact, pytorch, "PyTorch")
        times = round(row.ours / row.peers["PyTorch"], 3)
        row.notes |= {"norm": engine.norm, "times_pytorch": times}
        yield row


def _by_programs(p: Problem, dtype: str) -> Row:
    """Gradients of one micro-step through forward and backward programs."""
    from onelaunch.engines.coreml.training import CoreMLTrainer

    stored = p._replace(weights=_stored(p.weights, torch.float16))
    pytorch = _autograd(stored, torch.float32)
    trainer = CoreMLTrainer(p.config, dict(p.weights), staleness=0, dtype=dtype)
    try:
        trainer.train_step(p.tokens, p.targets)
        grads = _grads(dict(trainer.model.named_parameters()))
    finally:
        trainer.close()
    exact, peer = _autograd(p, torch.float64), "PyTorch, weights in float16"
    return _gradients_row(p, "coreml", dtype, grads, exact, pytorch, peer)


def _gradients_row(
    p: Problem,
    engine: str,
    dtype: str,
    grads: Weights,
    exact: Weights,
    pytorch: Weights,
    peer: str,
) -> Row:
    """A row on gradients: the error of all together, and the parameter whose own is the largest."""
    errors = {n: _apart(grads[n], g) for n, g in exact.items()}
    worst = max(errors, key=lambda n: errors[n])
    together = [torch.cat([g[n].flatten() for n in exact]) for g in (grads, exact, pytorch)]
    return Row(
        f"{p.model} gradients, {engine} {dtype}",
        _apart(together[0], together[1]),
        peers={peer: _apart(together[2], together[1])},
        notes={
            "what": "gradients", "model": p.model, "engine": engine, "dtype": dtype,
            "parameters": len(exact), "worst": worst, "worst_error": rounded(errors[worst], 3),
            "worst_pytorch": rounded(_apart(pytorch[worst], exact[worst]), 3),
        },
    )  # fmt: skip


def _autograd(p: Problem, dtype: torch.dtype) -> Weights:
    """Gradients by PyTorch, where the tokens are; bfloat16 is autocast's, the weights in
    float32."""
    place, narrow = p.tokens.device, dtype == torch.bfloat16
    stored = torch.float32 if narrow else dtype
    placed = {name: w.to(place, stored) for name, w in p.weights.items()}
    model = Model.from_weights(p.config, placed)
    model.requires_grad_(True)
    with torch.autocast(place.type, torch.bfloat16, enabled=narrow):
        logits = F.linear(model.hidden(p.tokens), model.head_weight()).to(stored)
    F.cross_entropy(logits.flatten(0, 1), p.targets.flatten()).backward()
    return _grads(dict(model.named_parameters()))


def _grads(parameters: Weights) -> Weights:
    return {n: p.grad.double().cpu() for n, p in parameters.items() if p.grad is not None}
