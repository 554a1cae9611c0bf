"""A child process that compiles all programs of a training step, for one version of the weights.

Run as `python -m onelaunch.engines.coreml.compiler`: a line of JSON has the model, shape, depth and
taps, and the store of compiled programs that is searched first; each line after it names a file
of weights and a folder for the programs, and is answered by a line: what it took, or why it cannot
be.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onelaunch.compilation.cache import Store
from onelaunch.compilation.child import lower_priority
from onelaunch.compilation.children import Child, parent_lines
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.emit import Taps
from onelaunch.engines.coreml.programs import DIRECTIONS, Programs, Wanted
from onelaunch.errors import RunFailed
from onelaunch.plan import Depth, Launch, Plan, launches, make_plan

COMMAND = (sys.executable, "-m", "onelaunch.engines.coreml.compiler")
_REASON_LETTERS = 300


@dataclass(frozen=True)
class Shape:
    """Model, shape, depth and taps of a set of programs; its plan is of all positions' logits."""

    config: ModelConfig
    batch: int
    sequence: int
    depth: Depth
    taps: Taps

    @property
    def plan(self) -> Plan:
        c = self.config
        return make_plan(c, self.batch, self.sequence, all_positions=True)

    def layer_launches(self) -> list[Launch]:
        """The launches that are programs in training: of layers, as embed and head are the
        host's."""
        plan = self.plan
        return [
            each
            for each in launches(plan, self.depth)
            if plan.stages[each.first].kind not in ("embed", "head")
        ]


def program_path(folder: Path, direction: str, number: int) -> Path:
    """The path of one program of a set."""
    return folder / f"{direction}-{number}.mlpackage"


def compile_set(
    shape: Shape, weights: dict[str, Any], folder: Path, store: Store | None = None
) -> dict[str, float]:
    """Write forward and backward programs of every launch; how many were compiled, how many the
    store had, and the seconds. Every one is looked up in the store, which keeps those without
    weights: the others are of this update alone."""
    from onelaunch.engines.coreml.pack import Packed

    start, plan, packed = time.perf_counter(), shape.plan, Packed(shape.config, weights)
    programs = Programs(store)
    for number, launch in enumerate(shape.layer_launches()):
        for direction in DIRECTIONS:
            wanted = Wanted(plan, launch, shape.taps, direction)
            path = program_path(folder, direction, number)
            programs.get(wanted, packed, path, keep=not wanted.weights)
    return {
        "compilations": programs.compilations,
        "hits": programs.hits,
        "seconds": time.perf_counter() - start,
    }


class Compiler:
    """The child, from the parent's side; it begins at once and stays until `close`."""

    def __init__(
        self, shape: Shape, store: Store | None = None, command: tuple[str, ...] = COMMAND
    ) -> None:
        self._shape, self._store, self._command = shape, store, command
        self._child: Child | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="onelaunch-coreml-")
        self._closed = False
        self._lock = threading.Lock()  # one thread compiles while another may close

    def compile(self, weights: Path, folder: Path) -> dict[str, float]:
        """Have a set compiled into an empty folder; see `compile_set`. Raises RunFailed with the
        reason where it cannot be, or it was closed; the next call begins a new child where this one
        has ended."""
        with self._lock:
            if self._closed:
                raise RunFailed("the compiler was closed")
            if self._child is None or not self._child.alive:
                self._end()
                self._child = Child(self._command, Path(self._scratch.name))
                self._child.send(json.dumps(_as_data(self._shape, self._store)))
            child = self._child
        line = ""
        if child.send(json.dumps({"weights": str(weights), "folder": str(folder)})):
            line = child.receive()
        try:
            answer = json.loads(line)
        except ValueError:
            raise RunFailed(f"the compiler ended ({child.reason()})") from None
        if "failed" in answer:
            raise RunFailed(f"a program does not compile: {answer['failed']}")
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it for good."""
        with self._lock:
            self._closed = True
            self._end()
            self._scratch.cleanup()

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


def _as_data(shape: Shape, store: Store | None) -> dict[str, Any]:
    kept = None if store is None else {"folder": str(store.folder), "limit": store.limit_bytes}
    return {**vars(shape), "config": shape.config.to_dict(), "store": kept}


def _work(shape: Shape, store: Store | None, job: dict[str, str]) -> str:
    from safetensors.torch import load_file

    try:
        weights = load_file(job["weights"])
        return json.dumps(compile_set(shape, weights, Path(job["folder"]), store))
    except Exception as error:  # whatever coremltools raises
        reason = str(error).strip() or type(error).__name__
        return json.dumps({"failed": reason[:_REASON_LETTERS]})


def main() -> None:
    """Run the child process."""
    lower_priority()
    torch.set_num_threads(1)  # the trainer has the cores
    lines = parent_lines()
    # lines that a compiler may print are no response
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)
        with suppress(BrokenPipeError, KeyboardInterrupt):
            data = json.loads(lines.get())
            kept = data.pop("store")
            store = kept and Store(Path(kept["folder"]), kept["limit"])
            shape = Shape(**{**data, "config": ModelConfig.from_dict(data["config"])})
            while True:
                print(_work(shape, store, json.loads(lines.get())), file=answers, flush=True)


if __name__ == "__main__":
    main()
