"""overlap: what a forward takes while something is compiled at the same time.

The published study evaluated one program again and again, alone and during 20 compilations in the
background, and found it 1.13 times as slow. Here one forward again and again: of an ML Program by
its evaluator and of PyTorch, while training's child process compiles ML Programs; on a GPU of the
CUDA engine, while its child process compiles Triton kernels. Rounds with and without compilations
take turns; only calls count that ended before the compilations did.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
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
from onelaunch.bench.core.record import Log, Row, percentiles
from onelaunch.bench.core.tables import document
from onelaunch.bench.core.timing import milliseconds
from onelaunch.bench.core.views import CASE, column, median_and_spread, published, table_of
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
"""Twice the published cost, 13%, is still little; more is not what was published."""
Call = Callable[[], object]


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Every case; yields rows."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    place = torch.device(device)
    reason = why_no_programs(device)
    if place.type == "cpu":
        coremltools("bench overlap")  # its compilations are the background
    for model, sequence in QUICK_CASES if quick else CASES:
        config = preset(model)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(config.vocab_size, (1, sequence), generator=generator)
        calls: dict[str, Call] = {}
        with ExitStack() as stack:
            background = stack.enter_context(closing(_background(config, sequence, place)))
            background.compile()  # its imports
            if reason:
                log(f"without the evaluation of ML Programs: {reason}")
                calls["CUDA engine"] = _cuda(config, tokens, place)
            else:
                calls["ML Program"] = stack.enter_context(_program(config, tokens))
                if not quick and model == CASES[0][0]:
                    engine = ReferenceEngine(config, random_weights(config), "cpu")
                    calls["PyTorch"] = partial(engine.logits, tokens)
            for name, call in calls.items():
                yield from _case(f"{name} {model} 1x{sequence}", call, background, rounds)


def _background(config: ModelConfig, sequence: int, device: torch.device) -> Background:
    if device.type == "cpu":
        return ProgramCompilations(config, random_weights(config), sequence)
    return KernelCompilations(config, sequence, device)


@contextmanager
def _program(config: ModelConfig, tokens_BS: torch.Tensor) -> Iterator[Call]:
    """The whole forward as one program."""
    plan = make_plan(config, *tokens_BS.shape, all_positions=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.mlpackage"
        weights = Packed(config, random_weights(config))
        save(emit(plan, program_launches(plan, "all")[0], weights), path)
        evaluator = Evaluator(Package(path))
        (name,) = evaluator.function.inputs
        yield lambda: evaluator({name: tokens_BS})


def _cuda(config: ModelConfig, tokens_BS: torch.Tensor, device: torch.device) -> Call:
    """One kernel per stage, as a graph."""
    from onelaunch.engines.cuda.engine import CudaEngine

    engine = CudaEngine(config, random_weights(config), str(device), fusion_depth="stage")
    tokens_BS = tokens_BS.to(device)

    def call() -> None:
        engine.logits(tokens_BS)
        torch.cuda.current_stream(device).synchronize()

    return call


def _case(case: str, call: Call, background: Background, rounds: int) -> Iterator[Row]:
    for _ in range(5):
        call()
    forwards: dict[str, list[list[float]]] = {"alone": [], "during": []}
    compiled: dict[str, list[float]] = {"alone": [], "during": []}
    for number in range(rounds):
        for during in (False, True) if number % 2 else (True, False):
            if during:
                forwards["during"].append(_during(call, background, compiled["during"]))
            else:
                forwards["alone"].append(_alone(call))
        if number < ALONE_ROUNDS:
            compiled["alone"].append(_compiled(background))
    count = rounds * _calls(background) * background.each
    for when, name in (("alone", "alone"), ("during", f"beside {count} compilations")):
        times = [ms for block in forwards[when] for ms in block]
        row = Row(
            f"{case}, {name}", statistics.fmean(times), percentiles(times), len(times),
            notes={
                "of": case,
                "median": round(statistics.median(times), 4),
                "most": round(max(times), 4),
                "threads": torch.get_num_threads(),
            },
        )  # fmt: skip
        if when == "during":
            slower = [
                statistics.fmean(busy) / statistics.fmean(alone)
                for alone, busy in zip(*forwards.values(), strict=True)
            ]
            row.notes |= {
                "compilations": count,
                "compiled": background.name,
                "refused": background.refused,
                "slowdown": round(statistics.median(slower), 4),
                "slowdown_spread": [round(v, 4) for v in percentiles(slower)],
                "compile_alone": round(statistics.median(compiled["alone"]), 4),
                "compile_beside": round(statistics.median(compiled["during"]), 4),
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


def _alone(call: Call) -> list[float]:
    """Milliseconds of each of the calls that begin within ALONE_SECONDS."""
    deadline = time.perf_counter() + ALONE_SECONDS
    times = [milliseconds(call)]
    while time.perf_counter() < deadline:
        times.append(milliseconds(call))
    return times


def _during(call: Call, background: Background, compiled: list[float]) -> list[float]:
    """Milliseconds of each of the calls during a round of compilations, whose own seconds are added
    to `compiled`."""
    errors: list[Exception] = []

    def compile() -> None:
        try:
            compiled.append(_compiled(background))
        except Exception as error:  # raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=compile, name="compiling", daemon=True)
    thread.start()
    times: list[float] = []
    while thread.is_alive():
        took = milliseconds(call)
        if thread.is_alive() or not times:
            times.append(took)
    thread.join()
    if errors:
        raise errors[0]
    return times


def pairs(record: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows without and with compilations, by what ran."""
    alone = {row["of"]: row for row in record["rows"] if "slowdown" not in row}
    return [
        (alone[row["of"]], row)
        for row in record["rows"]
        if "slowdown" in row and row["of"] in alone
    ]


def findings(record: dict[str, Any]) -> list[Finding]:
    """Findings on the times alone, and on the slowdown."""
    results = []

    def figures(average: float, most: float) -> str:
        return f"average {average:.3g} ms, most {most:.3g}"

    their_alone, their_during = (
        figures(published(key, "average, ms"), published(key, "most, ms"))
        for key in ("overlap-alone", "overlap-beside")
    )
    theirs = published("overlap-beside", "slowdown")
    for alone, during in pairs(record):
        results.append(
            Finding(
                ("overlap-alone",),
                f"{alone['of']}: one forward, alone",
                their_alone,
                figures(alone["ours"], alone["most"]),
                "not applicable",
                "another program on another device; the question is how much slower it becomes",
            )
        )
        error = standard_error(during["slowdown_spread"], during["compilations"] // COMPILATIONS)
        verdict = below(during["slowdown"], LITTLE, error)
        results.append(
            Finding(
                ("overlap-beside",),
                f"{during['of']}: compiling in the background slows a forward little",
                f"{theirs:g} times as slow during 20 compilations; {their_during}",
                f"{during['slowdown']:.2f} times as slow during {during['compilations']}; "
                + figures(during["ours"], during["most"]),
                verdict,
                f"up to {LITTLE:g}, twice the published cost, is little; compiling itself took "
                f"{during['compile_beside'] / during['compile_alone']:.2f} times as "
                f"long{unless(verdict)}",
                during["slowdown"] / theirs,
            )
        )
    return without_evaluated_seconds(results)


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    rows = [row for pair in pairs(record) for row in pair]
    for key in ("overlap-alone", "overlap-beside"):
        values = PUBLISHED[key].values
        rows.append({"case": f"study: {PUBLISHED[key].row}", **values})
        rows[-1] |= {"ours": values["average, ms"], "most": values["most, ms"]}
    parts = [
        table_of(
            rows,
            CASE,
            *median_and_spread("average, ms", "{:.3f}"),
            column("most, ms", "most", "{:.3f}"),
            column("forwards", "n"),
            column("slowdown", "slowdown", "{:.2f}"),
            column("a compilation alone, s", "compile_alone", "{:.2f}"),
            column("with forwards, s", "compile_beside", "{:.2f}"),
        ),
        "Slowdown is of the averages, round by round. Compilations are in a process of low "
        "priority. ML Programs are evaluated on this CPU, so that both want the same cores; the "
        "study's forward ran on a Neural Engine.",
    ]
    return document(record, "A forward while something is compiled, on", *parts)


def draw(record: dict[str, Any]) -> plots.Figure | None:
    """Averages and the slowest call."""
    both = pairs(record)
    return plots.bars(
        f"A forward while something is compiled, {record['device']}",
        {
            f"{when}: {what}": {rows[0]["of"]: rows[number][key] for rows in both}
            for number, when in enumerate(("alone", "during compilations"))
            for what, key in (("average", "ours"), ("most", "most"))
        },
        "what ran", "one forward, ms", log="y",
    )  # fmt: skip
