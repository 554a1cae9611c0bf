"""parity: how far each engine is from float64, in each precision that it knows on this machine.

Logits of every position of a text, random weights, against the same model in float64; beside each
what PyTorch loses in the same precision. The gradients of every parameter against float64 autograd,
of training with the reference engine, and on the CPU through ML Programs. On the CPU too the
largest magnitude that each kind of operation of the ML Programs gives, against float16's end.
Programs are evaluated on the CPU: that is what they mean, not what a Neural Engine computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.core.record import Row, Say
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


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every engine that runs on the device; yields rows."""
    place = torch.device(device)
    yield from _rows(place, quick, say)


def _rows(place: torch.device, quick: bool, say: Say) -> Iterator[Row]:
    for name, sequence in QUICK_MODELS if quick else MODELS:
        config, weights, tokens, targets = _problem(name, sequence)
        exact = exact_logits(config, weights, tokens)
        for engine, dtype, make in _engines(place, say):
            logits = make(config, weights).logits(tokens.to(place)).cpu().double()
            beside = _pytorch(config, weights, tokens, dtype, place, engine)
            yield _logits_row(f"{name} 1x{sequence}", engine, dtype, logits, beside, exact)
        yield from _trained(f"{name} 1x{sequence}", config, weights, tokens, targets, place)
        if place.type == "cpu" and _has_coremltools(say):
            yield from _magnitudes(f"{name} 1x{sequence}", config, weights, tokens)
    if place.type == "cpu" and _has_coremltools(lambda line: None):
        for dtype in ("float32", "float16"):
            yield _by_programs(*GRADIENTS, dtype)


def _problem(name: str, sequence: int) -> tuple[ModelConfig, Weights, Tensor, Tensor]:
    """A preset, random weights, tokens and targets."""
    config = preset(name)
    weights = random_weights(config)
    generator = torch.Generator().manual_seed(SEED)
    tokens, targets = torch.randint(config.vocab_size, (2, 1, sequence), generator=generator)
    return config, weights, tokens, targets


def _engines(place: torch.device, say: Say) -> Iterator[tuple[str, str, Make]]:
    """Engine, precision and its maker, of those that can run here."""
    if place.type == "cuda":
        from onelaunch.engines.cuda.engine import CudaEngine

        for dtype in ("bfloat16", "float16", "float32"):
            yield "cuda", dtype, _maker(CudaEngine, device=str(place), dtype=dtype)
        return
    for dtype in ("float32", "bfloat16"):
        yield "reference", dtype, _maker(ReferenceEngine, device="cpu", dtype=dtype)
    from onelaunch.engines import cpu

    if reason := cpu.why_not():
        say(f"without the CPU engine: {reason}")
    else:
        for dtype in cpu.DTYPES:
            yield "cpu", dtype, _maker(_compiled, dtype=dtype)
    if _has_coremltools(say):
        from onelaunch.engines.coreml.engine import CoreMLEngine

        for dtype in ("float32", "float16"):
            yield "coreml", dtype, _maker(CoreMLEngine, dtype=dtype)


def _maker(engine: Callable[..., Engine], **options: Any) -> Make:
    return lambda config, weights: engine(config, dict(weights), **options)


def _compiled(config: ModelConfig, weights: Weights, dtype: str) -> Engine:
    """The CPU engine, not the one that answers until it is there."""
    from onelaunch.bench.core.compiled import ready
    from onelaunch.engines.cpu.engine import CpuEngine

    return ready(CpuEngine(config, weights, dtype=dtype))


def _has_coremltools(say: Say) -> bool:
    from onelaunch.engines.coreml import coremltools

    try:
        coremltools("bench parity")
    except MissingExtra as error:
        say(f"without ML Programs: {error}")
        return False
    return True


def _pytorch(
    config: ModelConfig,
    weights: Weights,
    tokens: Tensor,
    dtype: str,
    place: torch.device,
    engine: str,
) -> Tensor:
    """Logits by PyTorch with the precision that the engine has: the CPU engine's bfloat16 is its
    weights', an ML Program's weights are float16 always; what else is told is arithmetic."""
    arithmetic = dtype
    if engine == "cpu" and dtype == "bfloat16":
        weights, arithmetic = _stored(weights, torch.bfloat16), "float32"
    elif engine == "coreml":
        weights = _stored(weights, torch.float16)
    model = Model.from_weights(
        config, {n: w.to(place, getattr(torch, arithmetic)) for n, w in weights.items()}
    )
    with torch.no_grad():
        logits = F.linear(model.hidden(tokens.to(place)), model.head_weight())
    return logits.cpu().double()


def _stored(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: w.to(dtype).to(w.dtype) if w.dim() > 1 else w for name, w in weights.items()}


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _logits_row(
    model: str, engine: str, dtype: str, logits: Tensor, beside: Tensor, exact: Tensor
) -> Row:
    by_pytorch = _apart(beside, exact)
    return Row(
        f"{model} logits, {engine} {dtype}",
        _apart(logits, exact),
        peers={"PyTorch": by_pytorch},
        notes={
            "what": "logits", "model": model, "engine": engine, "dtype": dtype,
            "times_pytorch": round(_apart(logits, exact) / by_pytorch, 3),
            "largest": float(f"{float((logits - exact).abs().max()):.3g}"),
            "same_argmax": round(float((logits.argmax(-1) == exact.argmax(-1)).double().mean()), 4),
        },
    )  # fmt: skip


def _magnitudes(model: str, config: ModelConfig, weights: Weights, tokens: Tensor) -> Iterator[Row]:
    """Of a forward in one program, the largest by kind of operation."""
    plan = make_plan(config, 1, tokens.shape[1], all_positions=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.mlpackage"
        save(emit(plan, program_launches(plan, "all")[0], Packed(config, weights)), path)
        evaluator = Evaluator(Package(path), "float32", watch=True)
        evaluator({TOKENS: tokens})
    beyond = len(magnitudes(evaluator.function, evaluator.largest))
    largest: dict[str, float] = {}
    for operation in evaluator.function.operations:
        value = evaluator.largest.get(operation.name, 0.0)
        largest[operation.kind] = max(largest.get(operation.kind, 0.0), value)
    for kind, value in sorted(largest.items(), key=lambda item: -item[1]):
        if value:
            yield Row(
                f"{model} largest of {kind}",
                value,
                notes={
                    "what": "magnitude", "model": model, "kind": kind, "unit": "magnitude",
                    "of_float16": float(f"{value / FLOAT16_END:.3g}"), "beyond": beyond,
                },
            )  # fmt: skip


def _trained(
    model: str,
    config: ModelConfig,
    weights: Weights,
    tokens: Tensor,
    targets: Tensor,
    place: torch.device,
) -> Iterator[Row]:
    """Gradients of a micro-step as `onelaunch train` takes it, in each precision it has: float32,
    and autocast to bfloat16, the weights in float32. Beside it the same with PyTorch's norm."""
    exact = _autograd(config, weights, tokens, targets, torch.float64)
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and place.type == "cuda" and not torch.cuda.is_bf16_supported():
            continue
        engine = ReferenceEngine(
            config, dict(weights), device=str(place), dtype=dtype, train=True, norm="auto"
        )
        engine.train_step(tokens, targets)
        found, there = _grads(engine.parameters()), (tokens.to(place), targets.to(place))
        beside = _autograd(config, weights, *there, getattr(torch, dtype))
        row = _gradients_row(model, "reference", dtype, found, exact, beside, "PyTorch")
        times = round(row.ours / row.peers["PyTorch"], 3)
        row.notes |= {"norm": engine.norm, "times_pytorch": times}
        yield row


def _by_programs(name: str, sequence: int, dtype: str) -> Row:
    """Gradients of one micro-step through forward and backward programs."""
    from onelaunch.engines.coreml.training import CoreMLTrainer

    config, weights, tokens, targets = _problem(name, sequence)
    exact = _autograd(config, weights, tokens, targets, torch.float64)
    beside = _autograd(config, _stored(weights, torch.float16), tokens, targets, torch.float32)
    trainer = CoreMLTrainer(config, dict(weights), staleness=0, dtype=dtype)
    try:
        trainer.train_step(tokens, targets)
        found = _grads(dict(trainer.model.named_parameters()))
    finally:
        trainer.close()
    model, peer = f"{name} 1x{sequence}", "PyTorch, weights in float16"
    return _gradients_row(model, "coreml", dtype, found, exact, beside, peer)


def _gradients_row(
    model: str, engine: str, dtype: str, found: Weights, exact: Weights, beside: Weights, peer: str
) -> Row:
    """Of every parameter: the error of all together, and the parameter whose own is the largest."""
    errors = {n: _apart(found[n], g) for n, g in exact.items()}
    worst = max(errors, key=lambda n: errors[n])
    together = [torch.cat([g[n].flatten() for n in exact]) for g in (found, exact, beside)]
    return Row(
        f"{model} gradients, {engine} {dtype}",
        _apart(together[0], together[1]),
        peers={peer: _apart(together[2], together[1])},
        notes={
            "what": "gradients", "model": model, "engine": engine, "dtype": dtype,
            "parameters": len(exact), "worst": worst, "worst_error": float(f"{errors[worst]:.3g}"),
            "worst_pytorch": float(f"{_apart(beside[worst], exact[worst]):.3g}"),
        },
    )  # fmt: skip


def _autograd(
    config: ModelConfig, weights: Weights, tokens: Tensor, targets: Tensor, dtype: torch.dtype
) -> Weights:
    """By PyTorch, where the tokens are; bfloat16 is autocast's, the weights in float32."""
    place, narrow = tokens.device, dtype == torch.bfloat16
    stored = torch.float32 if narrow else dtype
    model = Model.from_weights(config, {name: w.to(place, stored) for name, w in weights.items()})
    model.requires_grad_(True)
    with torch.autocast(place.type, torch.bfloat16, enabled=narrow):
        logits = F.linear(model.hidden(tokens), model.head_weight()).to(stored)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return _grads(dict(model.named_parameters()))


def _grads(parameters: Weights) -> Weights:
    return {n: p.grad.double().cpu() for n, p in parameters.items() if p.grad is not None}
