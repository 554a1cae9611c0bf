"""coreml: what making ML Programs of a model takes, by fusion depth, and how exact they are.

Random weights, one text of SEQUENCE tokens. `ours` is the seconds to emit, convert and save all
programs of a forward, coremltools' import not counted. Errors are of the logits of every position,
saved programs read back and evaluated on the CPU, against the model in float64: in float32, where
float16 constants are all that is lost, and in float16 rounded after every operation. Blocks of
feed-forward alone have the published study's sizes. What a Neural Engine takes is timed on a Mac;
elsewhere the line says that it was not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.bench.core.findings import Finding, above, error_of_ratio, needs_a_mac, unless
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.tables import digits, document, markdown
from onelaunch.bench.core.weights import exact_logits, random_weights
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.backward import emit_backward
from onelaunch.engines.coreml.emit import LOGITS, RESULT, TOKENS, X, emit, program_launches, save
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.package import Package
from onelaunch.errors import OnelaunchError
from onelaunch.plan import Launch, Plan, every_depth, make_plan, part_of

UNIT = "s"
SEQUENCE = 256
MODELS = ("stories260k", "stories15m", "stories110m")
QUICK_MODELS = MODELS[:1]
FFN = ((64, 128), (128, 256), (288, 768), (768, 2048))
FFN_LAYERS = (1, 12)
REPEATS = 3
PREDICTIONS = 30


@dataclass(frozen=True)
class _Made:
    """Programs on disk, and what they took."""

    paths: list[Path]
    launches: list[Launch]
    emit_seconds: float
    seconds: float
    operations: int
    n_bytes: int


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    coremltools("bench coreml")
    from onelaunch.engines.coreml import run as mac

    reason = mac.why_not()
    if reason is not None:
        say(f"not run here: {reason}")
    for name in QUICK_MODELS if quick else MODELS:
        yield from _model(name, quick, reason is None, say)
    for dim, hidden in FFN[:2] if quick else FFN:
        for layers in FFN_LAYERS:
            yield _blocks(dim, hidden, layers, quick, reason is None, say)


def _model(name: str, quick: bool, on_a_mac: bool, say: Say) -> Iterator[Row]:
    config = preset(name)
    weights = random_weights(config, 0)
    tokens = torch.randint(config.vocab_size, (1, SEQUENCE), generator=torch.manual_seed(0))
    exact = exact_logits(config, weights, tokens)
    plan = make_plan(config, 1, SEQUENCE, all_positions=True)
    depths = [depth for depth in every_depth(config.n_layers) if depth != "stage"]
    for depth in ("half", "all") if quick else depths:
        row = _row(f"{name} 1x{SEQUENCE} {depth}", plan, depth, weights, quick, on_a_mac, say)
        with tempfile.TemporaryDirectory() as folder:
            made = _forward(plan, depth, weights, Path(folder))
            row.notes["errors"] = {
                precision: _errors(_logits(made, weights, tokens, precision), exact)
                for precision in ("float32", "float16")
            }
        yield row
    for taps in ("full", "inputs"):
        row = _backward_row(f"{name} 1x{SEQUENCE} backward {taps}", plan, taps, weights, quick)
        yield row


def _blocks(dim: int, hidden: int, layers: int, quick: bool, on_a_mac: bool, say: Say) -> Row:
    config = ModelConfig(
        dim=dim, n_layers=layers, n_heads=dim // 32, hidden_dim=hidden, vocab_size=64,
        max_seq_len=SEQUENCE,
    )  # fmt: skip
    weights = random_weights(config, 0)
    plan = part_of(make_plan(config, 1, SEQUENCE, all_positions=True), "ffn")
    case = f"ffn {dim}/{hidden} 1x{SEQUENCE}, {layers} layer{'s' if layers > 1 else ''}"
    row = _row(case, plan, layers, weights, quick, on_a_mac, say)
    return row


def _row(
    case: str,
    plan: Plan,
    depth: str | int,
    weights: dict[str, Tensor],
    quick: bool,
    on_a_mac: bool,
    say: Say,
) -> Row:
    samples: list[_Made] = []
    notes: dict[str, Any] = {}
    for _ in range(1 if quick else REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            samples.append(_forward(plan, depth, weights, Path(folder)))
            if on_a_mac and len(samples) == 1:
                notes["core_ml"] = _on_a_mac(samples[0], say)
    return _as_row(case, plan, samples, notes)


def _as_row(case: str, plan: Plan, samples: list[_Made], notes: dict[str, Any]) -> Row:
    stated = sum(
        weight_bytes
        for made in samples[:1]
        for launch in made.launches
        for weight_bytes in [_weight_bytes(plan, launch)]
    )
    notes |= {
        "programs": len(samples[0].paths),
        "operations": samples[0].operations,
        "emit_seconds": round(min(made.emit_seconds for made in samples), 3),
        "bytes": samples[0].n_bytes,
        "over_weights": round(samples[0].n_bytes / stated, 3),
    }
    return Row.of(case, [made.seconds for made in samples], notes=notes)


def _weight_bytes(plan: Plan, launch: Launch) -> int:
    """Of a launch's weights in float16, each once."""
    stages = plan.stages[launch.first : launch.last]
    names = {name for stage in stages for name in stage.weights}
    shapes = plan.config.weight_shapes()
    return sum(2 * torch.Size(shapes[name]).numel() for name in names)


def _forward(plan: Plan, depth: str | int, weights: dict[str, Tensor], folder: Path) -> _Made:
    packed = Packed(plan.config, weights)
    found = list(program_launches(plan, depth))
    return _made(found, lambda launch: emit(plan, launch, packed), folder)


def _backward_row(case: str, plan: Plan, taps: str, weights: dict[str, Tensor], quick: bool) -> Row:
    packed = Packed(plan.config, weights)
    found = list(program_launches(plan, plan.config.n_layers))[:1]
    samples = []
    for _ in range(1 if quick else REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            samples.append(
                _made(
                    found,
                    lambda launch: emit_backward(plan, launch, packed, taps),  # type: ignore[arg-type]
                    Path(folder),
                )
            )
    return _as_row(case, plan, samples, {})


def _made(found: list[Launch], emit: Callable[[Launch], Any], folder: Path) -> _Made:
    paths, emit_seconds, seconds, operations = [], 0.0, 0.0, 0
    for number, launch in enumerate(found):
        start = time.perf_counter()
        emitted = emit(launch)
        paths.append(folder / f"{number}.mlpackage")
        save(emitted, paths[-1])
        seconds += time.perf_counter() - start
        emit_seconds += emitted.seconds
        operations += emitted.operations
    n_bytes = sum(f.stat().st_size for path in paths for f in path.rglob("*") if f.is_file())
    return _Made(paths, found, emit_seconds, seconds, operations, n_bytes)


def _logits(made: _Made, weights: dict[str, Tensor], tokens: Tensor, precision: str) -> Tensor:
    """Through all programs."""
    rows = weights["embed_tokens.weight"][tokens].half().float()
    given: dict[str, Any] = {TOKENS: tokens, X: rows.transpose(1, 2)[:, :, None]}
    for path in made.paths:
        evaluator = Evaluator(Package(path), precision)  # type: ignore[arg-type]
        outputs = evaluator({name: given[name] for name in evaluator.function.inputs})
        given = {X: outputs.get(RESULT)}
    tiles = [value for name, value in outputs.items() if name.startswith(LOGITS)]
    return torch.cat(tiles, 1)[:, :, 0].transpose(1, 2).double()


def _errors(logits: Tensor, exact: Tensor) -> dict[str, float]:
    cosine = float((logits * exact).sum() / logits.norm() / exact.norm())
    apart = float((logits - exact).norm() / exact.norm())
    return {"one_minus_cosine": float(f"{1 - cosine:.2e}"), "relative": float(f"{apart:.2e}")}


def _on_a_mac(made: _Made, say: Say) -> dict[str, Any]:
    """Seconds by Core ML, all programs one after another."""
    import numpy as np

    from onelaunch.engines.coreml.run import Runner

    found: dict[str, Any] = {"load_seconds": 0.0, "prediction_seconds": 0.0, "units": []}
    try:
        for path in made.paths:
            with Runner(path) as runner:
                inputs = {
                    name: np.zeros(kind.shape, np.int32 if kind.dtype == "int32" else np.float32)
                    for name, kind in Package(path).main.inputs.items()
                }
                times = []
                for _ in range(PREDICTIONS):
                    runner.predict(inputs)
                    assert runner.times is not None
                    times.append(runner.times.prediction)
                found["load_seconds"] += runner.load_seconds
                found["prediction_seconds"] += sorted(times)[len(times) // 2]
                found["units"].append(runner.units)
    except OnelaunchError as error:
        say(f"without Core ML's times: {error}")
        found["failed"] = str(error)
    return found


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of the largest program that was made, whose bytes are weights but for a hundredth; and of
    what its layers take to compile in one program and in several."""
    ones = [row for row in record["rows"] if row["programs"] == 1 and "errors" in row]
    if not ones:
        return []
    largest = max(ones, key=lambda row: row["bytes"])
    mb, published = largest["bytes"] / 1e6, float(PUBLISHED["sram"].values["MB"])
    found = [
        Finding(
            ("sram",),
            f"{published:g} MB of weights in one program meet no limit",
            f"{published:g} MB, run on a Neural Engine",
            f"{mb:,.0f} MB, evaluated on a CPU ({largest['case']})",
            *needs_a_mac("made, saved and read back here, not run on a Neural Engine"),
        )
    ]
    rows = {row["case"]: row for row in record["rows"]}
    whole, fours = (rows.get(f"stories110m 1x{SEQUENCE} {depth}") for depth in ("all", 4))
    if whole and fours:
        found.append(_growth(whole, fours))
    return found


def _growth(whole: dict[str, Any], fours: dict[str, Any]) -> Finding:
    """Conversions of the same layers, in one program and in programs of four."""
    values = PUBLISHED["compile-growth"].values
    published = float(values["12 layers, s"]) / (3 * float(values["4 layers, s"]))
    ours = whole["ours"] / fours["ours"]
    verdict = above(ours, 1.0, error_of_ratio(ours, whole, fours))
    return Finding(
        ("compile-growth",),
        "12 layers take longer to compile in one program than in programs of 4",
        f"{published:.2f}x ({values['12 layers, s']:g} s of one, {values['4 layers, s']:g} s of "
        "each)",
        f"{ours:.2f}x ({whole['ours']:.2f} s of one, {fours['ours']:.2f} s of all that replace it)",
        verdict,
        "coremltools' conversions of stories110m, embed and head with them; more than 1x is "
        f"confirmed{unless(verdict)}",
        ours / published,
    )


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    body = []
    for row in record["rows"]:
        errors = row.get("errors", {})
        body.append(
            [
                row["case"],
                digits(row["ours"]),
                digits(row["emit_seconds"]),
                str(row["programs"]),
                f"{row['operations']:,}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['over_weights']:.2f}x",
                *(_error(errors.get(precision)) for precision in ("float32", "float16")),
                _mac(row.get("core_ml")),
            ]
        )  # fmt: skip
    head = [
        "programs of one text", "s", "of it emitting", "programs", "operations", "MB",
        "over float16 weights", "float32: off, 1 - cosine", "float16: off, 1 - cosine",
        "Core ML on this machine",
    ]  # fmt: skip
    parts = [
        "Seconds to emit, convert and save all programs of a forward (or a backward through all "
        "layers), coremltools' import not counted. `off` is of the logits of every position "
        "against float64: programs read back from disk, evaluated on the CPU in float32, and in "
        "float16 rounded after every operation. A backward has the weights too; with `inputs` it "
        "computes the forward again, and has them twice.",
        markdown(head, body),
    ]
    return document(record, "ML Programs made on", *parts)


def _error(error: dict[str, float] | None) -> str:
    return "-" if error is None else f"{error['relative']:.1e}, {error['one_minus_cosine']:.0e}"


def _mac(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run here"
    if "failed" in found:
        return str(found["failed"])
    units = ", ".join(sorted(set(found["units"])))
    return f"{found['prediction_seconds'] * 1e6:,.0f} us ({units})"
