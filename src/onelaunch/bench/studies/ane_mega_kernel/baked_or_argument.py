"""baked-or-argument: from how many micro-steps an update weights that are constants would pay.

Constants are compiled anew at every update; arguments are compiled once and handed over at every
call. n micro-steps of an update take compile + n step one way, and hand over + n step the other:
constants overtake where their step is shorter by enough. One layer as an ML Program, evaluated on
this CPU, with its weights as constants and as inputs of the same program; beside them PyTorch. What
a Neural Engine's compiler makes of constants is not asked here.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import Finding, needs_a_mac
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Row, Say
from onelaunch.bench.core.rounds import in_rounds
from onelaunch.bench.core.tables import digits, document, markdown, spread
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
CHECKED = (1, 4, 16, 64)
"""Micro-steps of the updates that are timed whole, compilation with them."""
QUICK_CHECKED = (1, 16)
SAME = 1e-5
"""Error between the two forms, relative: they are the same arithmetic on the same numbers."""
FORMS = ("constants", "arguments", "PyTorch")


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every model; yields rows."""
    coremltools("bench baked-or-argument")
    for name in QUICK_MODELS if quick else MODELS:
        yield from _model(name, quick)


@dataclass
class _Layer:
    """One layer, forward, with weights that change: each form's update and step."""

    config: ModelConfig
    folder: Path
    seed: int = 0
    made: int = 0
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.plan = make_plan(c, 1, SEQUENCE, all_positions=True)
        self.launch = program_launches(self.plan, 1)[0]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, c.dim, 1, SEQUENCE, generator=generator)
        self.x = x.half().float()
        self.tokens = torch.randint(c.vocab_size, (1, SEQUENCE), generator=generator)
        path = self.folder / "arguments.mlpackage"
        start = time.perf_counter()
        save(_with_arguments(self.plan, self.launch, self._packed()), path)
        self.taking = Evaluator(Package(path), "float32")
        self.arguments_seconds = time.perf_counter() - start
        for form in FORMS:
            self.update(form)

    def update(self, form: str) -> float:
        """New weights for a form: the seconds until it could run with them."""
        self.seed += 1
        packed = self._packed()
        model = Model(self.config).init_weights(self.seed)
        start = time.perf_counter()
        if form == "constants":
            self.calls[form] = self._baked(packed)
        elif form == "arguments":
            self.calls[form] = self._given(packed)
        else:
            self.calls[form] = lambda: model.hidden(self.tokens)
        return time.perf_counter() - start

    def step(self, form: str) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            self.calls[form]()
        return time.perf_counter() - start

    def whole(self, form: str, n: int) -> float:
        """Seconds of an update and n micro-steps."""
        return self.update(form) + sum(self.step(form) for _ in range(n))

    def check(self) -> None:
        """Raises RunFailed where the two forms differ with the same weights."""
        packed = self._packed()
        a, b = (make(packed)()[RESULT] for make in (self._baked, self._given))
        apart = float((a - b).norm() / a.norm())
        if not apart <= SAME:
            raise RunFailed(f"constants and arguments give results that are {apart:.1e} apart")

    def _packed(self) -> Packed:
        made = Model(self.config).init_weights(self.seed).named_parameters()
        return Packed(self.config, {name: p.detach() for name, p in made})

    def _baked(self, packed: Packed) -> Callable[[], Any]:
        self.made += 1
        path = self.folder / f"{self.made}.mlpackage"
        save(emit(self.plan, self.launch, packed), path)
        evaluator = Evaluator(Package(path), "float32")
        return lambda: evaluator({X: self.x})

    def _given(self, packed: Packed) -> Callable[[], Any]:
        given: dict[str, Tensor] = {X: self.x}
        for name in _names(self.plan, self.launch):
            given[_plain(name)] = torch.from_numpy(packed(name)).float()
        return lambda: self.taking(given)


def _model(name: str, quick: bool) -> Iterator[Row]:
    config = preset(name).with_(n_layers=1, vocab_size=64)
    with tempfile.TemporaryDirectory() as folder:
        layer = _Layer(config, Path(folder))
        layer.check()
        updates = {
            form: [layer.update(form) for _ in range(QUICK_UPDATES if quick else UPDATES)]
            for form in FORMS
        }
        steps = in_rounds(
            {form: lambda form=form: layer.step(form) for form in FORMS},  # type: ignore[misc]
            QUICK_ROUNDS if quick else ROUNDS,
        )
        wholes: dict[tuple[str, int], list[float]] = {}
        for _ in range(1 if quick else 3):
            for n in QUICK_CHECKED if quick else CHECKED:
                for form in FORMS:
                    wholes.setdefault((form, n), []).append(layer.whole(form, n))
    notes = {"model": name, "threads": torch.get_num_threads()}
    for form in FORMS:
        more = {"compiled_once": round(layer.arguments_seconds, 4)} if form == "arguments" else {}
        of = {**notes, "form": form}
        yield Row.of(
            f"{name}, new weights, {form}", updates[form], notes={**of, "what": "update", **more}
        )
        yield Row.of(f"{name}, a step, {form}", steps[form], notes={**of, "what": "step"})
    saved = [a - b for a, b in zip(steps["arguments"], steps["constants"], strict=True)]
    yield Row.of(f"{name}, a step saved by constants", saved, notes={**notes, "what": "saved"})
    for (form, n), samples in wholes.items():
        row = Row.of(f"{name}, {n} micro-steps, {form}", samples)
        predicted = statistics.median(updates[form]) + n * statistics.median(steps[form])
        row.notes = {
            **notes, "form": form, "what": "whole", "steps": n, "predicted": round(predicted, 6),
        }  # fmt: skip
        yield row


# ---- the layer with its weights as inputs


class _Inputs(Packed):
    """In the place of a model's constants the program's inputs."""

    def __init__(self, config: ModelConfig, inputs: dict[str, Any]) -> None:
        super().__init__(config, {})
        self._inputs = inputs

    def __call__(self, name: str) -> Any:
        return self._inputs[_plain(name)]


class _Taking:
    """coremltools' builder, for which what is a value already needs no constant."""

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
    given = placeholders(plan, (X,))
    for name in _names(plan, launch):
        given[_plain(name)] = mil.Placeholder(
            sym_shape=packed(name).shape, dtype=mil.types.fp16, name=_plain(name)
        )
    program = mil.Program()
    stages = plan.stages[launch.first : launch.last]
    with mil.Function(given, opset_version=target.iOS18) as function:
        emitter = Emitter(plan, _Inputs(plan.config, function.inputs), "none")
        emitter.mb = _Taking(emitter.mb)
        emitter.begin(function.inputs, stages)
        for stage in stages:
            getattr(emitter, stage.kind)(stage)
        function.set_outputs(list(emitter.outputs()))
    program.add_function("main", function)
    return Emitted(program, launch, time.perf_counter() - start)


def _names(plan: Plan, launch: Launch) -> list[str]:
    stages = plan.stages[launch.first : launch.last]
    return list(dict.fromkeys(name for stage in stages for name in stage.weights))


def _plain(name: str) -> str:
    """A weight's name as that of an input."""
    return name.replace(".", "_")


# ---- what it says


def overtakes(record: dict[str, Any], model: str) -> int | None:
    """From how many micro-steps an update constants take less time than arguments; None where their
    step is not told to be shorter: where the 20th percentile of what it saves is no time."""
    rows = {(row["what"], row.get("form")): row for row in _of(record, model)}
    saved = rows["saved", None]
    more = rows["update", "constants"]["ours"] - rows["update", "arguments"]["ours"]
    if saved["spread"][0] <= 0:
        return None
    return max(1, math.ceil(more / saved["ours"]))


def _of(record: dict[str, Any], model: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["model"] == model and row["what"] != "whole"]


def _models(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in record["rows"]))


def findings(record: dict[str, Any]) -> list[Finding]:
    """Of arguments against constants, for each model's layer."""
    found = []
    for model in _models(record):
        rows = {(row["what"], row.get("form")): row for row in _of(record, model)}
        compiling = rows["update", "constants"]["ours"]
        found.append(
            Finding(
                ("mutable-inputs",),
                f"weights must be constants, a layer of {model}",
                str(PUBLISHED["mutable-inputs"].values["told"]),
                f"as inputs the same result; compiling constants takes {compiling * 1e3:,.0f} ms "
                "an update",
                *needs_a_mac(
                    "the public converter takes weights as inputs; what the private parser "
                    "refuses it does not say, nor what a step takes on a Neural Engine"
                ),
            )
        )
    return found


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    lines, wholes = [], []
    for row in record["rows"]:
        line = [row["case"], digits(1e3 * row["ours"]), spread(row, scale=1e3)]
        if row["what"] == "whole":
            wholes.append([*line, digits(1e3 * row["predicted"])])
        else:
            lines.append([*line, str(row["n"])])
    parts = [
        markdown(["one layer", "ms", "p20-p80", "n"], lines),
        *(_in_words(record, model) for model in _models(record)),
        "## Whole updates",
        markdown(["", "ms", "p20-p80", "by update and step"], wholes),
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
        return f"{model}: constants never overtake: their step is not told to be shorter."
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
        rows = {(row["what"], row.get("form")): row for row in _of(record, model)}
        for form, color in zip(FORMS, plots.COLORS, strict=False):
            update, step = (rows[what, form]["ours"] for what in ("update", "step"))
            axes.plot(counts, [1e3 * (update / n + step) for n in counts], color=color, label=form)
            whole = [
                (row["steps"], 1e3 * row["ours"] / row["steps"])
                for row in record["rows"]
                if row["model"] == model and row["what"] == "whole" and row["form"] == form
            ]
            axes.plot(*zip(*whole, strict=True), "o", color=color)
        plots.label(
            axes, "micro-steps an update", "ms a micro-step, compiling with it",
            f"a layer of {model}; dots: measured whole", log="xy",
        )  # fmt: skip
    return figure
