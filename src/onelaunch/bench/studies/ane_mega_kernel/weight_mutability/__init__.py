"""weight-mutability: which ways of giving a program its weights take new ones without compiling.

The published study found through private interfaces that weights must be constants: as inputs,
packed into the input's channels or overwritten on disk they were refused, or had no effect. The
same tried with the public converter, of one linear map: whether it converts, and whether the
result, evaluated on this CPU from the saved program, follows weights that change. Whether the
Neural Engine would run it is not known. What the ways of a GPU are: cuda.py.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import digest, in_rounds
from onelaunch.bench.core.timing import milliseconds
from onelaunch.bench.studies.ane_mega_kernel.weight_mutability import views
from onelaunch.bench.studies.ane_mega_kernel.weight_mutability.views import findings, table
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.emit import write
from onelaunch.engines.coreml.evaluate import Evaluator, Precision
from onelaunch.engines.coreml.lint import lint
from onelaunch.engines.coreml.package import Package

__all__ = ["UNIT", "findings", "run", "table"]

UNIT = "ms"
COLUMNS, OUT, WIDTH, MOST_APART = views.COLUMNS, views.OUT, views.WIDTH, views.MOST_APART
EVALUATIONS, QUICK_EVALUATIONS = 200, 40
CONVERSIONS, QUICK_CONVERSIONS = 7, 3
PRECISION: Precision = "float32"

X, W, BOTH, STATE, RESULT = "x", "w", "both", "w_state", "out"


@dataclass
class Way:
    """A way for a program to have its weights: its inputs' shapes, its body, and the arguments of a
    call.

    `body(mb, inputs, weight)` builds the result with coremltools' builder; `call(x, weight)` gives
    the inputs' tensors. `state`: the weight is a state of that shape. `baked`: it is a constant.
    """

    name: str
    inputs: Mapping[str, tuple[int, ...]]
    body: Callable[[Any, Mapping[str, Any], Tensor], Any]
    call: Callable[[Tensor, Tensor], dict[str, Tensor]]
    state: tuple[int, ...] | None = None
    baked: bool = False


def ways() -> list[Way]:
    """All ways."""
    x: dict[str, tuple[int, ...]] = {X: (1, COLUMNS, 1, WIDTH)}
    rows = COLUMNS * OUT // WIDTH  # of the packed input, that hold the weight

    def constants(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        half = weight.numpy().astype(np.float16)[:, :, None, None]
        return mb.conv(x=inputs[X], weight=mb.const(val=half), name=RESULT)

    def input_(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        return mb.conv(x=inputs[X], weight=inputs[W], name=RESULT)

    def product(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        x_1SC = mb.transpose(x=inputs[X], perm=[0, 2, 1, 3])
        return mb.matmul(x=inputs[W], y=x_1SC, name=RESULT)

    def linear(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        x_SC = mb.transpose(x=mb.reshape(x=inputs[X], shape=(COLUMNS, WIDTH)), perm=[1, 0])
        return mb.linear(x=x_SC, weight=inputs[W], name=RESULT)

    def packed(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        both = inputs[BOTH]
        x = mb.slice_by_size(x=both, begin=[0, 0, 0, 0], size=[1, COLUMNS, 1, WIDTH])
        w = mb.slice_by_size(x=both, begin=[0, COLUMNS, 0, 0], size=[1, rows, 1, WIDTH])
        return mb.conv(x=x, weight=mb.reshape(x=w, shape=[OUT, COLUMNS, 1, 1]), name=RESULT)

    def state(mb: Any, inputs: Mapping[str, Any], weight: Tensor) -> Any:
        return mb.conv(x=inputs[X], weight=mb.read_state(input=inputs[STATE]), name=RESULT)

    def as_kernel(name: str, x: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {X: x, name: w[:, :, None, None]}

    def as_rows(x: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {BOTH: torch.cat((x, w.reshape(1, -1, 1, WIDTH)), 1)}

    kernel = (OUT, COLUMNS, 1, 1)
    by_input, by_state = partial(as_kernel, W), partial(as_kernel, STATE)
    return [
        Way(views.CONSTANTS, x, constants, lambda x, w: {X: x}, baked=True),
        Way(views.INPUTS, x | {W: kernel}, input_, by_input),
        Way(
            views.PRODUCT,
            x | {W: (1, 1, OUT, COLUMNS)},
            product,
            lambda x, w: {X: x, W: w[None, None]},
        ),
        Way(views.LINEAR, x | {W: (OUT, COLUMNS)}, linear, by_input),
        Way(views.PACKED, {BOTH: (1, COLUMNS + rows, 1, WIDTH)}, packed, as_rows),
        Way(views.KEPT, x, state, by_state, state=kernel),
    ]


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every way of the device; yields rows."""
    if torch.device(device).type == "cpu":
        yield from _by_programs(quick)
        return
    from onelaunch.bench.studies.ane_mega_kernel.weight_mutability.cuda import rows

    yield from rows(torch.device(device), quick)


def _by_programs(quick: bool) -> Iterator[Row]:
    coremltools("bench weight-mutability")
    made: dict[str, Made] = {}
    count = QUICK_CONVERSIONS if quick else CONVERSIONS
    with tempfile.TemporaryDirectory() as name:
        for way in ways():
            made[way.name] = _made(way, Path(name) / str(len(made)), count)
        made[views.FILE] = _overwritten(Path(name), count)
        calls = {case: each.call for case, each in made.items() if each.call is not None}
        contestants = {case: partial(milliseconds, call) for case, call in calls.items()}
        samples = in_rounds(contestants, QUICK_EVALUATIONS if quick else EVALUATIONS)
    for case, each in made.items():
        notes = each.notes | {"threads": torch.get_num_threads()}
        if case in samples:
            yield Row.of(case, samples[case], notes=notes)
        else:
            yield Row(case, each.notes["refused_ms"], notes=notes)


@dataclass
class Made:
    """One way's programs: a row's notes of them, and an evaluation, None where refused."""

    notes: dict[str, Any]
    call: Callable[[], object] | None = None


def _made(way: Way, folder: Path, conversions: int) -> Made:
    """Convert; evaluate with two weights, changed as this way changes them."""
    x, weights = _numbers()
    seconds: list[float] = []
    for number in range(conversions):
        start = time.perf_counter()
        try:
            _convert(way, weights[0], folder / f"{number}.mlpackage")
        except ValueError as error:
            if "must be const" not in str(error):
                raise
            took = 1e3 * (time.perf_counter() - start)
            refused = str(error).strip().splitlines()[0]
            notes = {"converts": False, "refused": refused, "follows": False, "refused_ms": took}
            return Made(notes)
        seconds.append(1e3 * (time.perf_counter() - start))
    package = Package(folder / "0.mlpackage")
    evaluator = changed = _evaluator(package)
    if way.baked:
        _convert(way, weights[1], folder / "other.mlpackage")
        changed = _evaluator(Package(folder / "other.mlpackage"))
    most = max(
        _apart(each(way.call(x, w))[RESULT], x, w)
        for each, w in zip((evaluator, changed), weights, strict=True)
    )
    notes = {
        "converts": True,
        "follows": most < MOST_APART,
        "error": float(f"{most:.1e}"),
        "compiled_anew": way.baked,
        "convert_ms": digest(seconds),
        "remarks": sorted({str(each) for each in lint(package)}),
    }
    return Made(notes, partial(evaluator, way.call(x, weights[0])))


def _overwritten(folder: Path, loads: int) -> Made:
    """Two saved programs of the same form: the file of weights of one over that of the other."""
    x, weights = _numbers()
    paths = [folder / f"{number}.mlpackage" for number in range(2)]
    for path, w in zip(paths, weights, strict=True):
        _convert(ways()[0], w, path)
    packages = [Package(path) for path in paths]
    loaded = _evaluator(packages[0])
    shutil.copyfile(packages[1].weights_path, packages[0].weights_path)
    before = _apart(loaded({X: x})[RESULT], x, weights[1])
    loading = []
    for _ in range(loads):
        start = time.perf_counter()
        shutil.copyfile(packages[1].weights_path, packages[0].weights_path)
        again = _evaluator(Package(paths[0]))
        loading.append(1e3 * (time.perf_counter() - start))
    after = _apart(again({X: x})[RESULT], x, weights[1])
    notes = {
        "converts": True,
        "follows": before < MOST_APART,
        "follows_loaded_anew": after < MOST_APART,
        "error": float(f"{after:.1e}"),
        "compiled_anew": False,
        "change_ms": digest(loading),
    }
    return Made(notes, partial(again, {X: x}))


def _numbers() -> tuple[Tensor, list[Tensor]]:
    """x, (1, COLUMNS, 1, WIDTH), and two weights, (OUT, COLUMNS), all of them float16 numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, COLUMNS, 1, WIDTH, generator=generator).half().float()
    made = [torch.randn(OUT, COLUMNS, generator=generator) for _ in range(2)]
    return x, [(w / COLUMNS**0.5).half().float() for w in made]


def _apart(result: Tensor, x: Tensor, w: Tensor) -> float:
    """Error of a result against float64."""
    exact = w.double() @ x[0, :, 0].double()
    return float((result.reshape(exact.shape).double() - exact).norm() / exact.norm())


def _convert(way: Way, weight: Tensor, path: Path) -> None:
    """Emit, convert and save. Raises ValueError where coremltools refuses it."""
    ct = coremltools("bench weight-mutability")
    from coremltools.converters.mil import Builder, mil
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    half = mil.types.fp16
    inputs = {
        name: mil.Placeholder(sym_shape=shape, dtype=half, name=name)
        for name, shape in way.inputs.items()
    }
    if way.state:
        inputs[STATE] = StateTensorPlaceholder(sym_shape=way.state, dtype=half, name=STATE)
    program = mil.Program()
    with mil.Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs([way.body(Builder, function.inputs, weight)])
    program.add_function("main", function)
    write(program, path)


def _evaluator(package: Package) -> Evaluator:
    """A state is an input of each call, as the host would have written it before."""
    function = package.main
    if function.states:
        operations = tuple(
            replace(each, kind="identity", inputs={"x": each.inputs["input"]})
            if each.kind == "read_state"
            else each
            for each in function.operations
        )
        inputs = {**function.inputs, **function.states}
        package.functions["main"] = replace(function, inputs=inputs, operations=operations)
    return Evaluator(package, PRECISION)
