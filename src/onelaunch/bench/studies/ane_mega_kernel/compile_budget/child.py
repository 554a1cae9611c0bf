"""What compile-budget measures in processes of their own.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.compile_budget.child WHAT ...`; it prints
one JSON object.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

# ruff: noqa: E402 (the imports are part of what is timed)
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def again(count: str) -> dict[str, Any]:
    """One shape, new weights each time."""
    return _many([(SEQUENCE, seed) for seed in range(int(count))])


def distinct(count: str) -> dict[str, Any]:
    """As many shapes."""
    return _many([(8 + number, 0) for number in range(int(count))])


def restart() -> dict[str, Any]:
    """The first compilation and the second."""
    with tempfile.TemporaryDirectory() as folder:
        _compile(Path(folder) / "0.mlpackage", SEQUENCE, 0)
        first = time.perf_counter()
        _compile(Path(folder) / "1.mlpackage", SEQUENCE, 1)
    return {"until_first": first - _BEGAN, "second": time.perf_counter() - first}


def layers(count: str, path: str) -> dict[str, Any]:
    """So many layers of stories110m's in a program, without embed and head; what says no to it."""
    config = preset("stories110m").with_(n_layers=int(count), vocab_size=64)
    weights = random_weights(config, 0)
    coremltools("bench compile-budget")
    plan = make_plan(config, 1, SEQUENCE, all_positions=True)
    launch = program_launches(plan, config.n_layers)[0]
    start, refused, operations, n_bytes = time.perf_counter(), "", 0, 0
    try:
        emitted = emit(plan, launch, Packed(config, weights))
        operations = emitted.operations
        save(emitted, Path(path))
        seconds = time.perf_counter() - start
        package = Package(Path(path))
        n_bytes = package.weight_file_bytes
        refused = next((str(each) for each in lint(package) if each.severity == "error"), "")
    except Exception as error:  # whatever coremltools raises: that is the answer
        seconds = time.perf_counter() - start
        refused = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return {
        "seconds": seconds, "refused": refused, "weight_bytes": n_bytes, "operations": operations,
    }  # fmt: skip


def _many(cases: list[tuple[int, int]]) -> dict[str, Any]:
    coremltools("bench compile-budget")
    seconds, of_process, failures = [], [], 0
    before = memory()
    for sequence, seed in cases:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                _compile(Path(folder) / "program.mlpackage", sequence, seed)
            except Exception as error:  # whatever coremltools raises is a failure to be counted
                print(f"{sequence}: {error}", file=sys.stderr)
                failures += 1
            seconds.append(round(time.perf_counter() - start, 5))
        of_process.append(memory())
    return {"seconds": seconds, "bytes": of_process, "bytes_before": before, "failures": failures}


def _compile(path: Path, sequence: int, seed: int) -> None:
    plan = make_plan(LAYER, 1, sequence, all_positions=True)
    packed = Packed(LAYER, random_weights(LAYER, seed))
    save(emit(plan, program_launches(plan, "all")[0], packed), path)


def memory() -> int:
    """Bytes that the process has now; where that cannot be read, the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    what: dict[str, Callable[..., dict[str, Any]]] = {
        "again": again, "distinct": distinct, "restart": restart, "layers": layers,
    }  # fmt: skip
    print(json.dumps(what[sys.argv[1]](*sys.argv[2:])))
