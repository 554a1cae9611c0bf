"""overlap: what a forward takes while something is compiled beside it.

The published study evaluated one program again and again, alone and during 20 compilations in the
background, and found it 1.13 times as slow. Here one forward again and again: of an ML Program by
its evaluator and of PyTorch, while training's child process compiles ML Programs; on a GPU of the
CUDA engine, while its child process compiles Triton kernels. Rounds alone and beside take turns;
only calls count that ended before the compilations did.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from onelaunch.bench.core import plots
from onelaunch.bench.core.findings import (
    Finding,
    below,
    standard_error,
    unless,
    without_evaluated_seconds,
)
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.record import Row, Say, percentiles
from onelaunch.bench.core.tables import document, markdown, spread
from onelaunch.bench.core.weights import SEED, random_weights
from onelaunch.bench.studies.ane_mega_kernel.overlap.background import (
    Background,
    KernelCompilations,
    ProgramCompilations,
)
from onelaunch.bench.studies.ane_mega_kernel.program_training import preset, why_no_programs
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.emit import emit, program_launches, save
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.package import Package
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.plan import make_plan

UNIT = "ms"
CASES = (("stories260k", 64), ("stories15m", 64))
QUICK_CASES = CASES[:1]
ROUNDS, QUICK_ROUNDS = 5, 2
COMPILATIONS = 4
"""A round: 20 in all, as in the study."""
ALONE_SECONDS = 2.0
ALONE_ROUNDS = 2
"""In which compilations are timed alone, too."""
LITTLE = 1.26
"""Twice the published cost, 13%, is still little beside waiting; more is not what was published."""
Call = Callable[[], object]


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Every case; yields rows."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    place = torch.device(device)
    if place.type == "cpu":
        coremltools("bench overlap")  # its compilations are the background
    for model, sequence in QUICK_CASES if quick else CASES:
        config = preset(model)
        with ExitStack() as opened:
            background = opened.enter_context(closing(_background(config, sequence, place)))
            background.compile()  # its imports
            calls: dict[str, Call] = {}
            if reason := why_no_programs(device):
                say(f"without the evaluation of ML Programs: {reason}")
                calls["CUDA engine"] = _cuda(config, sequence, place)
            else:
                calls["ML Program"] = opened.enter_context(_program(config, sequence))
                if not quick and model == CASES[0][0]:
                    calls["PyTorch"] = _pytorch(config, sequence)
            for name, call in calls.items():
                case = f"{name} {model} 1x{sequence}"
                yield from _case(case, call, background, rounds)


def _background(config: ModelConfig, sequence: int, device: torch.device) -> Background:
    if device.type == "cpu":
        return ProgramCompilations(config, random_weights(config), sequence)
    return KernelCompilations(config, sequence, device)


def _tokens(config: ModelConfig, sequence: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (1, sequence), generator=generator)


@contextmanager
def _program(config: ModelConfig, sequence: int) -> Iterator[Call]:
    """The whole forward as one program."""
    plan = make_plan(config, 1, sequence, all_positions=True)
    launch = program_launches(plan, "all")[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.mlpackage"
        save(emit(plan, launch, Packed(config, random_weights(config))), path)
        evaluator = Evaluator(Package(path))
        (name,) = evaluator.function.inputs
        given = {name: _tokens(config, sequence)}
        yield lambda: evaluator(given)


def _pytorch(config: ModelConfig, sequence: int) -> Call:
    engine, tokens = (
        ReferenceEngine(config, random_weights(config), "cpu"),
        _tokens(config, sequence),
    )
    return lambda: engine.logits(tokens)


def _cuda(config: ModelConfig, sequence: int, device: torch.device) -> Call:
    """A launch a stage, as a graph; nothing is measured in the background."""
    from onelaunch.engines.cuda.engine import CudaEngine

    engine = CudaEngine(config, random_weights(config), str(device), fusion_depth="stage")
    tokens = _tokens(config, sequence).to(device)

    def call() -> None:
        engine.logits(tokens)
        torch.cuda.current_stream(device).synchronize()

    return call


def _case(case: str, call: Call, background: Background, rounds: int) -> Iterator[Row]:
    for _ in range(5):
        call()
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    compiled: dict[str, list[float]] = {"alone": [], "beside": []}
    for number in range(rounds):
        for together in (False, True) if number % 2 else (True, False):
            if together:
                beside.append(_beside(call, background, compiled["beside"]))
            else:
                alone.append(_until(call, time.perf_counter() + ALONE_SECONDS))
        if number < ALONE_ROUNDS:
            compiled["alone"].append(_compiled(background))
    slower = [statistics.fmean(b) / statistics.fmean(a) for a, b in zip(alone, beside, strict=True)]
    count = rounds * _calls(background) * background.each
    for name, each in (("alone", alone), (f"beside {count} compilations", beside)):
        times = [ms for block in each for ms in block]
        row = Row(
            f"{case}, {name}",
            statistics.fmean(times),
            percentiles(times),
            len(times),
            notes={
                "of": case,
                "median": round(statistics.median(times), 4),
                "most": round(max(times), 4),
                "threads": torch.get_num_threads(),
            },
        )
        if each is beside:
            row.notes |= {
                "compilations": count,
                "compiled": background.name,
                "refused": background.refused,
                "slowdown": round(statistics.median(slower), 4),
                "slowdown_spread": [round(v, 4) for v in percentiles(slower)],
                "compile_alone": round(statistics.median(compiled["alone"]), 4),
                "compile_beside": round(statistics.median(compiled["beside"]), 4),
            }
        yield row


def _calls(background: Background) -> int:
    return max(1, COMPILATIONS // background.each)


def _compiled(background: Background) -> float:
    """Seconds of each compilation of a round."""
    start = time.perf_counter()
    for _ in range(_calls(background)):
        background.compile()
    return (time.perf_counter() - start) / (_calls(background) * background.each)


def _beside(call: Call, background: Background, compiled: list[float]) -> list[float]:
    failed: list[Exception] = []

    def compile() -> None:
        try:
            compiled.append(_compiled(background))
        except Exception as error:  # raised again where it is seen
            failed.append(error)

    thread = threading.Thread(target=compile, name="compiling", daemon=True)
    thread.start()
    times: list[float] = []
    while thread.is_alive():
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        if thread.is_alive() or not times:
            times.append(1e3 * (end - start))
    thread.join()
    if failed:
        raise failed[0]
    return times


def _until(call: Call, deadline: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter()
    while end < deadline or not times:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        times.append(1e3 * (end - start))
    return times


def pairs(record: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows alone and beside, by what ran."""
    alone = {row["of"]: row for row in record["rows"] if "slowdown" not in row}
    return [
        (alone[row["of"]], row)
        for row in record["rows"]
        if "slowdown" in row and row["of"] in alone
    ]


def findings(record: dict[str, Any]) -> list[Finding]:
    """What ran alone, for the figures, and its slowdown."""
    found = []
    theirs = {key: PUBLISHED[key].values for key in ("overlap-alone", "overlap-beside")}

    def told(average: Any, most: Any) -> str:
        return f"average {average:.3g} ms, most {most:.3g}"

    for alone, beside in pairs(record):
        values = theirs["overlap-alone"]
        found.append(
            Finding(
                ("overlap-alone",),
                f"{alone['of']}: one forward, alone",
                told(values["average, ms"], values["most, ms"]),
                told(alone["ours"], alone["most"]),
                "not applicable",
                "another program on another device; what is asked is how much slower it becomes",
            )
        )
        values = theirs["overlap-beside"]
        slowdown = float(values["slowdown"])
        error = standard_error(beside["slowdown_spread"], beside["compilations"] // COMPILATIONS)
        verdict = below(beside["slowdown"], LITTLE, error)
        found.append(
            Finding(
                ("overlap-beside",),
                f"{beside['of']}: compiling in the background costs what runs little",
                f"{slowdown:g} times as slow beside 20 compilations; "
                + told(values["average, ms"], values["most, ms"]),
                f"{beside['slowdown']:.2f} times as slow beside {beside['compilations']}; "
                + told(beside["ours"], beside["most"]),
                verdict,
                f"up to {LITTLE:g}, twice the published cost, is little; compiling itself took "
                f"{beside['compile_beside'] / beside['compile_alone']:.2f} times as "
                f"long{unless(verdict)}",
                beside["slowdown"] / slowdown,
            )
        )
    return without_evaluated_seconds(found)


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    lines = []
    for alone, beside in pairs(record):
        for row in (alone, beside):
            lines.append(
                [
                    row["case"], f"{row['ours']:.3f}", spread(row, "{:.3f}".format),
                    f"{row['most']:.3f}", str(row["n"]), *_beside_only(row),
                ]
            )  # fmt: skip
    for key in ("overlap-alone", "overlap-beside"):
        values = PUBLISHED[key].values
        lines.append(
            [
                f"study: {PUBLISHED[key].row}", f"{values['average, ms']}", "-",
                f"{values['most, ms']}", "-", f"{values.get('slowdown', '-')}", "-", "-",
            ]
        )  # fmt: skip
    parts = [
        markdown(
            [
                "", "average, ms", "p20-p80", "most, ms", "forwards", "slowdown",
                "a compilation alone, s", "beside, s",
            ],
            lines,
        ),
        "Slowdown is of the averages, round by round. Compilations are in a process of low "
        "priority. ML Programs are evaluated on this CPU, so that both want the same cores; the "
        "study's forward ran on a Neural Engine.",
    ]  # fmt: skip
    return document(record, "A forward while something is compiled, on", *parts)


def _beside_only(row: dict[str, Any]) -> list[str]:
    if "slowdown" not in row:
        return ["-"] * 3
    return [f"{row[name]:.2f}" for name in ("slowdown", "compile_alone", "compile_beside")]


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Averages and the slowest call."""
    found = pairs(record)
    return plots.bars(
        f"A forward while something is compiled, {record['device']}",
        {
            f"{when}: {what}": {rows[0]["of"]: rows[number][key] for rows in found}
            for number, when in enumerate(("alone", "beside compilations"))
            for what, key in (("average", "ours"), ("most", "most"))
        },
        "what ran", "one forward, ms", log="y",
    )  # fmt: skip
