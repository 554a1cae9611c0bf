"""baked-or-argument: from how many micro-steps an update weights that are constants would pay.

Constants are compiled anew at every update; arguments are compiled once and passed to every call.
n micro-steps of an update take compile + n step one way, and pass + n step the other: constants
overtake where their step is shorter by enough. One layer as an ML Program, evaluated on this CPU,
with its weights as constants and as inputs of the same program, and the layer in PyTorch. What a
Neural Engine's compiler makes of constants is not measured here.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, needs_a_mac
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import in_rounds
from onelaunch.bench.core.tables import digits, document
from onelaunch.bench.core.views import CASE, N, column, median_and_spread, statement, table_of
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.emit import (
    RESULT,
    Emitted,
    Emitter,
    X,
    emit,
    placeholders,
    program_launches,
    save,
)
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.package import Package
from onelaunch.errors import RunFailed
from onelaunch.model import Model
from onelaunch.plan import Launch, Plan, make_plan

UNIT = "s"
MODELS, SEQUENCE = ("stories15m", "stories110m"), 64
QUICK_MODELS = MODELS[:1]
ROUNDS, QUICK_ROUNDS = 60, 25
UPDATES, QUICK_UPDATES = 7, 3
CHECKED, QUICK_CHECKED = (1, 4, 16, 64), (1, 16)
"""Micro-steps of the updates that are timed whole, compilation with them."""
WHOLE_ROUNDS, QUICK_WHOLE_ROUNDS = 3, 1
MOST_APART = 1e-5
"""Error between the two forms, relative: they are the same arithmetic on the same numbers."""
FORMS = ("constants", "arguments", "PyTorch")


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every model; yields rows."""
    coremltools("bench baked-or-argument")
    for name in QUICK_MODELS if quick else MODELS:
        yield from _model(name, quick)


def _model(name: str, quick: bool) -> Iterator[Row]:
    count = QUICK_UPDATES if quick else UPDATES
    wholes: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        layer = _Layer(preset(name).with_(n_layers=1, vocab_size=64), Path(folder))
        layer.check()
        updates = {form: [layer.update(form) for _ in range(count)] for form in FORMS}
        steps = in_rounds(
            {form: partial(layer.step, form) for form in FORMS}, QUICK_ROUNDS if quick else ROUNDS
        )
        for _ in range(QUICK_WHOLE_ROUNDS if quick else WHOLE_ROUNDS):
            for n in QUICK_CHECKED if quick else CHECKED:
                for form in FORMS:
                    seconds = layer.update(form) + sum(layer.step(form) for _ in range(n))
                    wholes.setdefault((form, n), []).append(seconds)
    notes = {"model": name, "threads": torch.get_num_threads()}
    for form in FORMS:
        once = {"compiled_once": round(layer.arguments_seconds, 4)} if form == "arguments" else {}
        about = {**notes, "form": form, "what": "update", **once}
        yield Row.of(f"{name}, new weights, {form}", updates[form], notes=about)
        about = {**notes, "form": form, "what": "step"}
        yield Row.of(f"{name}, a step, {form}", steps[form], notes=about)
    saved = [a - b for a, b in zip(steps["arguments"], steps["constants"], strict=True)]
    yield Row.of(f"{name}, a step saved by constants", saved, notes={**notes, "what": "saved"})
    for (form, n), samples in wholes.items():
        predicted = statistics.median(updates[form]) + n * statistics.median(steps[form])
        about = {**notes, "form": form, "what": "whole", "steps": n}
        about["predicted"] = round(predicted, 6)
        yield Row.of(f"{name}, {n} micro-steps, {form}", samples, notes=about)


class _Layer:
    """One layer, forward, with weights that change: each form's update and step."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.config, self._folder = config, folder
        self._seed = self._programs = 0
        self._calls: dict[str, Callable[[], Any]] = {}
        self._plan = make_plan(config, 1, SEQUENCE, all_positions=True)
        self._launch = program_launches(self._plan, 1)[0]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, config.dim, 1, SEQUENCE, generator=generator)
        self._x = x.half().float()
        self._tokens = torch.randint(config.vocab_size, (1, SEQUENCE), generator=generator)
        path = folder / "arguments.mlpackage"
        start = time.perf_counter()
        save(_with_arguments(self._plan, self._launch, self._packed()), path)
        self._by_arguments = Evaluator(Package(path), "float32")
        self.arguments_seconds = time.perf_counter() - start
        for form in FORMS:
            self.update(form)

    def update(self, form: str) -> float:
        """New weights for a form: the seconds until it could run with them."""
        self._seed += 1
        packed = self._packed()
        model = Model(self.config).init_weights(self._seed)
        start = time.perf_counter()
        if form == "constants":
            self._calls[form] = self._with_constants(packed)
        elif form == "arguments":
            self._calls[form] = self._with_inputs(packed)
        else:
            self._calls[form] = lambda: model.hidden(self._tokens)
        return time.perf_counter() - start

    def step(self, form: str) -> float:
        """Seconds of a form's forward."""
        start = time.perf_counter()
        with torch.no_grad():
            self._calls[form]()
        return time.perf_counter() - start

    def check(self) -> None:
        """Raises RunFailed where the two forms differ with the same weights."""
        packed = self._packed()
        a, b = (make(packed)()[RESULT] for make in (self._with_constants, self._with_inputs))
        apart = float((a - b).norm() / a.norm())
        if not apart <= MOST_APART:
            raise RunFailed(f"constants and arguments give results that are {apart:.1e} apart")

    def _packed(self) -> Packed:
        made = Model(self.config).init_weights(self._seed).named_parameters()
        return Packed(self.config, {name: p.detach() for name, p in made})

    def _with_constants(self, packed: Packed) -> Callable[[], Any]:
        self._programs += 1
        path = self._folder / f"{self._programs}.mlpackage"
        save(emit(self._plan, self._launch, packed), path)
        evaluator = Evaluator(Package(path), "float32")
        return lambda: evaluator({X: self._x})

    def _with_inputs(self, packed: Packed) -> Callable[[], Any]:
        inputs: dict[str, Tensor] = {X: self._x}
        for name in _weight_names(self._plan, self._launch):
            inputs[_input_name(name)] = torch.from_numpy(packed(name)).float()
        return lambda: self._by_arguments(inputs)


# ---- the layer with its weights as inputs


class _Inputs(Packed):
    """A program's inputs, for an emitter that reads constants."""

    def __init__(self, config: ModelConfig, inputs: dict[str, Any]) -> None:
        super().__init__(config, {})
        self._inputs = inputs

    def __call__(self, name: str) -> Any:
        return self._inputs[_input_name(name)]


class _Builder:
    """coremltools' builder, but a constant that is a program's value already stays that value."""

    def __init__(self, mb: Any) -> None:
        self._mb = mb

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mb, name)

    def const(self, val: Any) -> Any:
        return val if hasattr(val, "sym_type") else self._mb.const(val=val)


def _with_arguments(plan: Plan, launch: Launch, packed: Packed) -> Emitted:
    """A launch as `emit` makes it, but every weight an input of its own."""
    from coremltools import target
    from coremltools.converters.mil import mil

    start = time.perf_counter()
    inputs = placeholders(plan, (X,))
    for name in _weight_names(plan, launch):
        inputs[_input_name(name)] = mil.Placeholder(
            sym_shape=packed(name).shape, dtype=mil.types.fp16, name=_input_name(name)
        )
    program = mil.Program()
    stages = plan.stages[launch.first : launch.last]
    with mil.Function(inputs, opset_version=target.iOS18) as function:
        emitter = Emitter(plan, _Inputs(plan.config, function.inputs), "none")
        emitter.mb = _Builder(emitter.mb)
        emitter.begin(function.inputs, stages)
        for stage in stages:
            getattr(emitter, stage.kind)(stage)
        function.set_outputs(list(emitter.outputs()))
    program.add_function("main", function)
    return Emitted(program, launch, time.perf_counter() - start)


def _weight_names(plan: Plan, launch: Launch) -> list[str]:
    stages = plan.stages[launch.first : launch.last]
    return list(dict.fromkeys(name for stage in stages for name in stage.weights))


def _input_name(weight: str) -> str:
    return weight.replace(".", "_")


# ---- what it says


def overtakes(record: dict[str, Any], model: str) -> int | None:
    """The number of micro-steps an update from which constants take less time than arguments; None
    where the 20th percentile of the time that their step saves is not above 0."""
    rows = _rows(record, model)
    saved = rows["saved", None]
    more = rows["update", "constants"]["ours"] - rows["update", "arguments"]["ours"]
    return max(1, math.ceil(more / saved["ours"])) if saved["spread"][0] > 0 else None


def _rows(record: dict[str, Any], model: str) -> dict[tuple[str, str | None], dict[str, Any]]:
    """A model's rows of updates and steps, by what they are and form."""
    return {
        (row["what"], row.get("form")): row
        for row in record["rows"]
        if row["model"] == model and row["what"] != "whole"
    }


def _models(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in record["rows"]))


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings about arguments against constants, for each model's layer."""
    verdict, why = needs_a_mac(
        "the public converter takes weights as inputs; what the private parser refuses it does not "
        "say, nor what a step takes on a Neural Engine"
    )
    results = []
    for model in _models(record):
        compiling = 1e3 * _rows(record, model)["update", "constants"]["ours"]
        ours = f"as inputs the same result; compiling constants takes {compiling:,.0f} ms an update"
        claim = f"weights must be constants, a layer of {model}"
        published = statement("mutable-inputs")
        results.append(Finding(("mutable-inputs",), claim, published, ours, verdict, why))
    return results


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    wholes = [row for row in record["rows"] if row["what"] == "whole"]
    others = [row for row in record["rows"] if row["what"] != "whole"]
    ms = median_and_spread("ms", scale=1e3)
    parts = [
        table_of(others, column("one layer", "case"), *ms, N),
        *(_in_words(record, model) for model in _models(record)),
        "## Whole updates",
        table_of(wholes, CASE, *ms, column("by update and step", "predicted", digits, 1e3)),
        "New weights: with constants emitting, converting, saving and reading back; with arguments "
        "laying them out. The program is evaluated in float32 on this CPU, where constants are "
        "read once and arguments at every call; PyTorch has embedding and last norm as well. The "
        "study found that weights must be constants; the public converter takes them as inputs, "
        "and whether the Neural Engine does is not known.",
    ]
    return document(record, "Weights as constants or as arguments, on", *parts)


def _in_words(record: dict[str, Any], model: str) -> str:
    n = overtakes(record, model)
    if n is None:
        return f"{model}: constants never overtake: their step is not measurably shorter."
    return f"{model}: constants overtake from {n:,} micro-steps an update on."


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Milliseconds a micro-step by micro-steps an update, by form."""
    models = _models(record)
    if not models:
        return None
    title = f"Constants or arguments, evaluated on {record['device']}"
    figure, all_axes = plots.panels(len(models), title=title)
    counts = [2**i for i in range(13)]
    for axes, model in zip(all_axes, models, strict=True):
        rows = _rows(record, model)
        for form, color in zip(FORMS, plots.COLORS, strict=False):
            update, step = (rows[what, form]["ours"] for what in ("update", "step"))
            axes.plot(counts, [1e3 * (update / n + step) for n in counts], color=color, label=form)
            whole = [
                (row["steps"], 1e3 * row["ours"] / row["steps"])
                for row in record["rows"]
                if row["what"] == "whole" and (row["model"], row["form"]) == (model, form)
            ]
            axes.plot(*zip(*whole, strict=True), "o", color=color)
        plots.label(
            axes, "micro-steps an update", "ms a micro-step, compiling with it",
            f"a layer of {model}; dots: measured whole", log="xy",
        )  # fmt: skip
    return figure
