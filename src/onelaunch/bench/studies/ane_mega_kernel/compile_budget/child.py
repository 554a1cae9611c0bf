"""What compile-budget measures of ML Programs, in processes of their own.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.compile_budget.child WHAT NUMBER DEVICE`;
it prints one JSON object.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

# ruff: noqa: E402 (the imports are part of what is timed)
import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from onelaunch.bench.core.weights import random_weights
from onelaunch.config import preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.emit import emit, program_launches, save
from onelaunch.engines.coreml.lint import lint
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.package import Package
from onelaunch.plan import make_plan

SEQUENCE = 64
LAYER = preset("stories260k").with_(n_layers=1)

Case = TypeVar("Case")
Result = dict[str, Any]


def again(count: int) -> Result:
    """One shape, new weights each time."""
    return _many([(SEQUENCE, seed) for seed in range(count)])


def distinct(count: int) -> Result:
    """Programs of so many shapes."""
    return _many([(8 + number, 0) for number in range(count)])


def restart(number: int) -> Result:
    """The first compilation and the second."""
    with tempfile.TemporaryDirectory() as folder:
        _compile((SEQUENCE, 0), Path(folder))
        first = time.perf_counter()
        _compile((SEQUENCE, 1), Path(folder))
        return {"until_first": first - _BEGAN, "second": time.perf_counter() - first}


def layers(count: int) -> Result:
    """So many layers of stories110m's in a program, without embed and head; the reason where it is
    refused."""
    config = preset("stories110m").with_(n_layers=count, vocab_size=64)
    weights = random_weights(config, 0)
    coremltools("bench compile-budget")
    plan = make_plan(config, 1, SEQUENCE, all_positions=True)
    launch = program_launches(plan, config.n_layers)[0]
    result: Result = {"refused": "", "weight_bytes": 0, "operations": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.mlpackage"
        start = time.perf_counter()
        try:
            emitted = emit(plan, launch, Packed(config, weights))
            result["operations"] = emitted.operations
            save(emitted, path)
            result["seconds"] = time.perf_counter() - start
            package = Package(path)
            result["weight_bytes"] = package.weight_file_bytes
            errors = [str(each) for each in lint(package) if each.severity == "error"]
            result["refused"] = next(iter(errors), "")
        except Exception as error:  # whatever coremltools raises: that is the answer
            result["seconds"] = time.perf_counter() - start
            result["refused"] = first_line(error)
    return result


def first_line(error: Exception) -> str:
    """Why something was refused."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def repeat(
    action: Callable[[Case, Path], object],
    cases: Iterable[Case],
    gauges: Mapping[str, Callable[[], int]],
) -> Result:
    """Do something for each case, with an empty folder: seconds, failures, and what each gauge
    showed before and after each; 0 of a gauge is no reading."""
    result: Result = {"seconds": [], "failures": 0}
    for name, gauge in gauges.items():
        result |= {name: [], f"{name}_before": gauge()}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                action(case, Path(folder))
            except Exception as error:  # whatever a compiler or a driver raises is a failure
                print(f"{case}: {error}", file=sys.stderr)
                result["failures"] += 1
            result["seconds"].append(round(time.perf_counter() - start, 5))
        for name, gauge in gauges.items():
            last = result[name][-1] if result[name] else result[f"{name}_before"]
            result[name].append(gauge() or last)
    return result


def memory() -> int:
    """Bytes that the process has now; where that cannot be read, the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _many(cases: list[tuple[int, int]]) -> Result:
    coremltools("bench compile-budget")
    return repeat(_compile, cases, {"bytes": memory})


def _compile(case: tuple[int, int], folder: Path) -> None:
    """A layer for a sequence's length and a seed of its weights."""
    sequence, seed = case
    plan = make_plan(LAYER, 1, sequence, all_positions=True)
    packed = Packed(LAYER, random_weights(LAYER, seed))
    save(emit(plan, program_launches(plan, "all")[0], packed), folder / f"{seed}.mlpackage")


if __name__ == "__main__":
    actions = {"again": again, "distinct": distinct, "restart": restart, "layers": layers}
    print(json.dumps(actions[sys.argv[1]](int(sys.argv[2]))))
