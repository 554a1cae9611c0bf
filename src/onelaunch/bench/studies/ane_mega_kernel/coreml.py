"""coreml: what making ML Programs of a model takes, by fusion depth, and how exact they are.

Random weights, one sequence of SEQUENCE tokens. `ours` is the seconds to emit, convert and save all
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.bench.core.findings import Finding, above, error_of_ratio, needs_a_mac, unless
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import column, published, table_of
from onelaunch.bench.core.weights import exact_logits, random_weights
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.backward import emit_backward
from onelaunch.engines.coreml.emit import (
    LOGITS,
    RESULT,
    TOKENS,
    Emitted,
    Taps,
    X,
    emit,
    program_launches,
    save,
)
from onelaunch.engines.coreml.evaluate import Evaluator, Precision
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
PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
TAPS: tuple[Taps, ...] = ("full", "inputs")


@dataclass(frozen=True)
class _Made:
    """Programs on disk, and what they took."""

    paths: list[Path]
    emit_seconds: float
    seconds: float
    operations: int
    n_bytes: int


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    coremltools("bench coreml")
    from onelaunch.engines.coreml import run as mac

    reason = mac.why_not()
    if reason is not None:
        log(f"not run here: {reason}")
    repeats = 1 if quick else REPEATS
    on_a_mac = None if reason is not None else log
    for name in QUICK_MODELS if quick else MODELS:
        yield from _model(name, quick, repeats, on_a_mac)
    for dim, hidden in FFN[:2] if quick else FFN:
        for layers in FFN_LAYERS:
            config = ModelConfig(
                dim=dim, n_layers=layers, n_heads=dim // 32, hidden_dim=hidden, vocab_size=64,
                max_seq_len=SEQUENCE,
            )  # fmt: skip
            plan = part_of(make_plan(config, 1, SEQUENCE, all_positions=True), "ffn")
            case = f"ffn {dim}/{hidden} 1x{SEQUENCE}, {layers} layer{'s' if layers > 1 else ''}"
            launches = list(program_launches(plan, layers))
            emitter = partial(emit, plan, packed=Packed(config, random_weights(config, 0)))
            yield _row(case, plan, launches, emitter, repeats, on_a_mac)


def _model(name: str, quick: bool, repeats: int, on_a_mac: Log | None) -> Iterator[Row]:
    config = preset(name)
    weights = random_weights(config, 0)
    packed = Packed(config, weights)
    tokens = torch.randint(config.vocab_size, (1, SEQUENCE), generator=torch.manual_seed(0))
    exact = exact_logits(config, weights, tokens)
    plan = make_plan(config, 1, SEQUENCE, all_positions=True)
    depths = [depth for depth in every_depth(config.n_layers) if depth != "stage"]
    emitter = partial(emit, plan, packed=packed)
    for depth in ("half", "all") if quick else depths:
        launches = list(program_launches(plan, depth))
        case = f"{name} 1x{SEQUENCE} {depth}"
        row = _row(case, plan, launches, emitter, repeats, on_a_mac)
        with tempfile.TemporaryDirectory() as folder:
            paths = _make(launches, emitter, Path(folder)).paths
            row.notes["errors"] = {
                precision: _errors(_logits(paths, weights, tokens, precision), exact)
                for precision in PRECISIONS
            }
        yield row
    whole = list(program_launches(plan, config.n_layers))[:1]
    for taps in TAPS:
        case = f"{name} 1x{SEQUENCE} backward {taps}"
        backward = partial(emit_backward, plan, packed=packed, taps=taps)
        yield _row(case, plan, whole, backward, repeats, None)


def _row(
    case: str,
    plan: Plan,
    launches: list[Launch],
    emitter: Callable[[Launch], Emitted],
    repeats: int,
    on_a_mac: Log | None,
) -> Row:
    """A row of programs made some times over; on a Mac also what running them takes."""
    samples: list[_Made] = []
    notes: dict[str, Any] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            samples.append(_make(launches, emitter, Path(folder)))
            if on_a_mac is not None and len(samples) == 1:
                notes["core_ml"] = _by_core_ml(samples[0].paths, on_a_mac)
    made = samples[0]
    weight_bytes = sum(_weight_bytes(plan, launch) for launch in launches)
    notes |= {
        "programs": len(made.paths),
        "operations": made.operations,
        "emit_seconds": round(min(each.emit_seconds for each in samples), 3),
        "bytes": made.n_bytes,
        "over_weights": round(made.n_bytes / weight_bytes, 3),
    }
    return Row.of(case, [each.seconds for each in samples], notes=notes)


def _weight_bytes(plan: Plan, launch: Launch) -> int:
    """The bytes of a launch's weights in float16, each once."""
    stages = plan.stages[launch.first : launch.last]
    names = {name for stage in stages for name in stage.weights}
    shapes = plan.config.weight_shapes()
    return sum(2 * torch.Size(shapes[name]).numel() for name in names)


def _make(launches: list[Launch], emitter: Callable[[Launch], Emitted], folder: Path) -> _Made:
    paths, emit_seconds, seconds, operations = [], 0.0, 0.0, 0
    for number, launch in enumerate(launches):
        start = time.perf_counter()
        emitted = emitter(launch)
        paths.append(folder / f"{number}.mlpackage")
        save(emitted, paths[-1])
        seconds += time.perf_counter() - start
        emit_seconds += emitted.seconds
        operations += emitted.operations
    n_bytes = sum(f.stat().st_size for path in paths for f in path.rglob("*") if f.is_file())
    return _Made(paths, emit_seconds, seconds, operations, n_bytes)


def _logits(
    paths: list[Path], weights: dict[str, Tensor], tokens: Tensor, precision: Precision
) -> Tensor:
    """Through all programs."""
    rows = weights["embed_tokens.weight"][tokens].half().float()
    inputs: dict[str, Any] = {TOKENS: tokens, X: rows.transpose(1, 2)[:, :, None]}
    for path in paths:
        evaluator = Evaluator(Package(path), precision)
        outputs = evaluator({name: inputs[name] for name in evaluator.function.inputs})
        inputs = {X: outputs.get(RESULT)}
    tiles = [value for name, value in outputs.items() if name.startswith(LOGITS)]
    return torch.cat(tiles, 1)[:, :, 0].transpose(1, 2).double()


def _errors(logits: Tensor, exact: Tensor) -> dict[str, float]:
    cosine = float((logits * exact).sum() / logits.norm() / exact.norm())
    apart = float((logits - exact).norm() / exact.norm())
    return {"one_minus_cosine": float(f"{1 - cosine:.2e}"), "relative": float(f"{apart:.2e}")}


def _by_core_ml(paths: list[Path], log: Log) -> dict[str, Any]:
    """Seconds by Core ML, all programs one after another."""
    import numpy as np

    from onelaunch.engines.coreml.run import Runner

    result: dict[str, Any] = {"load_seconds": 0.0, "prediction_seconds": 0.0, "units": []}
    try:
        for path in paths:
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
                result["load_seconds"] += runner.load_seconds
                result["prediction_seconds"] += sorted(times)[len(times) // 2]
                result["units"].append(runner.units)
    except OnelaunchError as error:
        log(f"without Core ML's times: {error}")
        result["failed"] = str(error)
    return result


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings about the largest program that was made, whose bytes are weights but for a
    hundredth; and of what its layers take to compile in one program and in several."""
    ones = [row for row in record["rows"] if row["programs"] == 1 and "errors" in row]
    if not ones:
        return []
    largest, theirs = max(ones, key=lambda row: row["bytes"]), published("sram", "MB")
    results = [
        Finding(
            ("sram",),
            f"{theirs:g} MB of weights in one program meet no limit",
            f"{theirs:g} MB, run on a Neural Engine",
            f"{largest['bytes'] / 1e6:,.0f} MB, evaluated on a CPU ({largest['case']})",
            *needs_a_mac("made, saved and read back here, not run on a Neural Engine"),
        )
    ]
    rows = {row["case"]: row for row in record["rows"]}
    whole, fours = (rows.get(f"stories110m 1x{SEQUENCE} {depth}") for depth in ("all", 4))
    return results + ([_growth(whole, fours)] if whole and fours else [])


def _growth(whole: dict[str, Any], fours: dict[str, Any]) -> Finding:
    """Conversions of the same layers, in one program and in programs of four."""
    twelve, four = (published("compile-growth", f"{layers} layers, s") for layers in (12, 4))
    theirs, ours = twelve / (3 * four), whole["ours"] / fours["ours"]
    verdict = above(ours, 1.0, error_of_ratio(ours, whole, fours))
    return Finding(
        ("compile-growth",),
        "12 layers take longer to compile in one program than in programs of 4",
        f"{theirs:.2f}x ({twelve:g} s of one, {four:g} s of each)",
        f"{ours:.2f}x ({whole['ours']:.2f} s of one, {fours['ours']:.2f} s of all that replace it)",
        verdict,
        "coremltools' conversions of stories110m, embed and head with them; more than 1x is "
        f"confirmed{unless(verdict)}",
        ours / theirs,
    )


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = [
        "Seconds to emit, convert and save all programs of a forward (or a backward through all "
        "layers), coremltools' import not counted. `off` is of the logits of every position "
        "against float64: programs read back from disk, evaluated on the CPU in float32, and in "
        "float16 rounded after every operation. A backward has the weights too; with `inputs` it "
        "computes the forward again, and has them twice.",
        table_of(
            record["rows"],
            column("programs of one sequence", "case"),
            column("s", "ours", digits),
            column("of it emitting", "emit_seconds", digits),
            column("programs", "programs"),
            column("operations", "operations", "{:,}"),
            column("MB", "bytes", "{:,.1f}", 1e-6),
            column("over float16 weights", "over_weights", "{:.2f}x"),
            *(column(f"{p}: off, 1 - cosine", "errors", partial(_error, p)) for p in PRECISIONS),
            ("Core ML on this machine", lambda row: _core_ml(row.get("core_ml"))),
        ),
    ]
    return document(record, "ML Programs made on", *parts)


def _error(precision: str, errors: dict[str, dict[str, float]]) -> str:
    error = errors[precision]
    return f"{error['relative']:.1e}, {error['one_minus_cosine']:.0e}"


def _core_ml(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run here"
    if "failed" in result:
        return str(result["failed"])
    units = ", ".join(sorted(set(result["units"])))
    return f"{result['prediction_seconds'] * 1e6:,.0f} us ({units})"
