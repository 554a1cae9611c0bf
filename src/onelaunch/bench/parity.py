"""parity: how far each engine is from float64, in each precision that it knows on this machine.

Logits of every position of a text, random weights, against the same model in float64; beside each
what PyTorch loses in the same precision. Then the largest magnitude that each kind of operation of
the ML Programs gives, against float16's end, and the gradients of training through ML Programs
against float64 autograd. Programs are evaluated on the CPU: that is what they mean, not what a
Neural Engine computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.findings import Finding
from onelaunch.bench.record import Row
from onelaunch.bench.tables import markdown, provenance
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.engine import Engine
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, MissingExtra
from onelaunch.model import Model
from onelaunch.plan import make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = "relative error"
MODELS = (("stories260k", 128), ("stories15m", 64))
"""And of how many tokens."""
QUICK_MODELS = MODELS[:1]
GRADIENTS = ("stories260k", 64)
SEED = 1
MOST_TIMES = 2.0
"""What an engine may lose, times what PyTorch does in the same precision: sums of other order and
other points of rounding differ by less."""
MOST_APART = {"float32": 1e-2, "float16": 5e-2}
"""Of gradients, all of them together: programs hold weights in float16, a relative 5e-4 each, which
either precision passes on; in float16 every operation rounds as well."""
FLOAT16_END = 65_504

Weights = dict[str, Tensor]
Make = Callable[[ModelConfig, Weights], Engine]


def run(device: str, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    """Every engine that runs on the device; yields rows."""
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise BadInput(f"parity: --device {device}: runs on cpu or cuda; use one of them")
    for row in _rows(place, quick, say):
        say(f"{row.case}: {row.ours:.2e}")
        yield row


def _rows(place: torch.device, quick: bool, say: Callable[[str], None]) -> Iterator[Row]:
    for name, sequence in QUICK_MODELS if quick else MODELS:
        config, weights, tokens, _ = _problem(name, sequence)
        exact = _exact_logits(config, weights, tokens)
        for engine, dtype, make in _engines(place, say):
            logits = make(config, weights).logits(tokens.to(place)).cpu().double()
            beside = _pytorch(config, weights, tokens, dtype, place, engine)
            yield _logits_row(f"{name} 1x{sequence}", engine, dtype, logits, beside, exact)
        if place.type == "cpu" and _has_coremltools(say):
            yield from _magnitudes(f"{name} 1x{sequence}", config, weights, tokens)
    if place.type == "cpu" and _has_coremltools(lambda line: None):
        for dtype in ("float32", "float16"):
            yield _gradients(*GRADIENTS, dtype)


def _problem(name: str, sequence: int) -> tuple[ModelConfig, Weights, Tensor, Tensor]:
    """A preset, random weights, tokens and targets."""
    config = preset(name)
    weights = {n: p.detach() for n, p in Model(config).init_weights(SEED).named_parameters()}
    generator = torch.Generator().manual_seed(SEED)
    tokens, targets = torch.randint(config.vocab_size, (2, 1, sequence), generator=generator)
    return config, weights, tokens, targets


def _engines(place: torch.device, say: Callable[[str], None]) -> Iterator[tuple[str, str, Make]]:
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
    from onelaunch.bench.compiled import ready
    from onelaunch.engines.cpu.engine import CpuEngine

    return ready(CpuEngine(config, weights, dtype=dtype))


def _has_coremltools(say: Callable[[str], None]) -> bool:
    from onelaunch.engines.coreml import coremltools

    try:
        coremltools("bench parity")
    except MissingExtra as error:
        say(f"without ML Programs: {error}")
        return False
    return True


def _exact_logits(config: ModelConfig, weights: Weights, tokens: Tensor) -> Tensor:
    model = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    with torch.no_grad():
        return F.linear(model.hidden(tokens), model.head_weight())


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
    from onelaunch.engines.coreml.emit import TOKENS, emit, program_launches, save
    from onelaunch.engines.coreml.evaluate import Evaluator
    from onelaunch.engines.coreml.lint import magnitudes
    from onelaunch.engines.coreml.pack import Packed
    from onelaunch.engines.coreml.package import Package

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


def _gradients(name: str, sequence: int, dtype: str) -> Row:
    """Of every parameter, after one micro-step through forward and backward programs."""
    from onelaunch.engines.coreml.training import CoreMLTrainer

    config, weights, tokens, targets = _problem(name, sequence)
    exact = _autograd(config, weights, tokens, targets, torch.float64)
    beside = _autograd(config, _stored(weights, torch.float16), tokens, targets, torch.float32)
    trainer = CoreMLTrainer(config, dict(weights), staleness=0, dtype=dtype)
    try:
        trainer.loss_and_gradients(tokens, targets)
        found = {
            n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None
        }
    finally:
        trainer.close()
    errors = {n: _apart(found[n], g) for n, g in exact.items()}
    worst = max(errors, key=lambda n: errors[n])
    together = [torch.cat([g[n].flatten() for n in exact]) for g in (found, exact, beside)]
    return Row(
        f"{name} 1x{sequence} gradients, coreml {dtype}",
        _apart(together[0], together[1]),
        peers={"PyTorch, weights in float16": _apart(together[2], together[1])},
        notes={
            "what": "gradients", "model": name, "engine": "coreml", "dtype": dtype,
            "parameters": len(exact), "worst": worst, "worst_error": float(f"{errors[worst]:.3g}"),
        },
    )  # fmt: skip


def _autograd(
    config: ModelConfig, weights: Weights, tokens: Tensor, targets: Tensor, dtype: torch.dtype
) -> Weights:
    model = Model.from_weights(config, {name: w.to(dtype) for name, w in weights.items()})
    model.requires_grad_(True)
    logits = F.linear(model.hidden(tokens), model.head_weight())
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def findings(record: dict[str, Any]) -> list[Finding]:
    """Nothing here was published: what the record says of our own engines."""
    found = []
    for row in record["rows"]:
        if row["what"] == "logits" and row["engine"] != "reference":
            within = row["times_pytorch"] <= MOST_TIMES
            found.append(
                Finding(
                    (),
                    f"{row['model']}: the {row['engine']} engine in {row['dtype']} loses no more "
                    f"than {MOST_TIMES:g} times what PyTorch does",
                    "not measured",
                    f"{row['ours']:.1e}, PyTorch {row['peers']['PyTorch']:.1e}",
                    "confirmed" if within else "refuted",
                    "relative error of all logits against float64; the most likely token is the "
                    f"same at {row['same_argmax']:.1%} of positions",
                    row["times_pytorch"],
                )
            )
        if row["what"] == "gradients":
            most = MOST_APART[row["dtype"]]
            found.append(
                Finding(
                    (),
                    f"gradients through ML Programs in {row['dtype']} are within {most:g}",
                    "not measured",
                    f"{row['ours']:.1e}",
                    "confirmed" if row["ours"] <= most else "refuted",
                    f"{row['parameters']} parameters together against float64 autograd; the worst, "
                    f"{row['worst']}, {row['worst_error']:.1e}",
                )
            )
    return found + list(_by_magnitude(record))


def _by_magnitude(record: dict[str, Any]) -> Iterator[Finding]:
    rows = [row for row in record["rows"] if row["what"] == "magnitude"]
    for model in dict.fromkeys(row["model"] for row in rows):
        most = max((r for r in rows if r["model"] == model), key=lambda row: row["ours"])
        yield Finding(
            (),
            f"{model}: no operation of a forward program comes near float16's end",
            "not measured",
            f"{most['ours']:,.0f} of {FLOAT16_END:,} ({most['kind']})",
            "refuted" if most["beyond"] else "confirmed",
            f"random weights, evaluated in float32; {most['beyond']} operations pass a limit that "
            "the linter knows; the mask of attention is meant to be large",
        )


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    rows = record["rows"]
    parts = [f"# Errors against float64, on {record['device']}", provenance(record)]
    logits = [row for row in rows if row["what"] == "logits"]
    gradients = [row for row in rows if row["what"] == "gradients"]
    magnitude = [row for row in rows if row["what"] == "magnitude"]
    if logits:
        lines = [
            [
                f"{row['model']}, {row['engine']} {row['dtype']}", f"{row['ours']:.2e}",
                f"{row['peers']['PyTorch']:.2e}", f"{row['times_pytorch']:.2f}x",
                f"{row['largest']:.2e}", f"{row['same_argmax']:.1%}",
            ]
            for row in logits
        ]  # fmt: skip
        header = ["logits", "error", "PyTorch", "times", "largest of one", "same token"]
        parts += [
            "## Logits of every position",
            markdown(header, lines),
            "Relative, all logits together, random weights. PyTorch has the engine's precision: "
            "bfloat16 of the CPU engine is its weights', an ML Program's weights are float16.",
        ]
    if gradients:
        lines = [
            [
                row["case"], f"{row['ours']:.2e}", *(f"{v:.2e}" for v in row["peers"].values()),
                f"{row['worst']} {row['worst_error']:.2e}",
            ]
            for row in gradients
        ]  # fmt: skip
        header = ["gradients", "error", "PyTorch, float16 weights", "worst parameter"]
        parts += ["## Gradients through ML Programs", markdown(header, lines)]
    if magnitude:
        lines = [
            [f"{row['model']}, {row['kind']}", f"{row['ours']:,.3g}", f"{row['of_float16']:.2%}"]
            for row in magnitude
        ]
        parts += [
            "## The largest magnitude by kind of operation",
            markdown(["ML Program of a forward", "largest", "of float16's end"], lines),
            "The mask, -40,000, is added to scores: it is meant to be large.",
        ]
    return "\n\n".join(parts) + "\n"


def draw(record: dict[str, Any]) -> Figure | None:
    """Errors of logits, ours beside PyTorch's in the same precision."""
    from onelaunch.bench import plots

    rows = [row for row in record["rows"] if row["what"] == "logits"]
    if not rows:
        return None
    figure = plots.new_figure(7.5, 1.2 + 0.4 * len(rows))
    axes = figure.subplots()
    at = range(len(rows))
    ours, theirs = [row["ours"] for row in rows], [row["peers"]["PyTorch"] for row in rows]
    axes.barh([i - 0.2 for i in at], ours, 0.38, color="#1f5a8f", label="the engine")
    axes.barh([i + 0.2 for i in at], theirs, 0.38, color="#999999", label="PyTorch")
    names = [f"{row['model']}, {row['engine']} {row['dtype']}" for row in rows]
    axes.set_yticks(list(at), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative error of logits against float64")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    axes.set_title(f"Errors by engine and precision, {record['device']}", fontsize=10)
    return figure
