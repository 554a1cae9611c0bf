"""A child process that compiles all programs of a training step, for one version of the weights.

Run as `python -m onelaunch.engines.coreml.compiler`: a line of JSON says for which model, shape,
depth and taps; each line after it names a file of weights and a folder for the programs, and is
answered by a line: what it took, or why it cannot be.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onelaunch.compilation.child import lower_priority
from onelaunch.compilation.children import Child, lines_of_parent
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.emit import Taps, program_launches
from onelaunch.errors import RunFailed
from onelaunch.plan import Depth, Launch, Plan, make_plan

COMMAND = (sys.executable, "-m", "onelaunch.engines.coreml.compiler")
_REASON_LETTERS = 300


@dataclass(frozen=True)
class Shape:
    """What a set of programs is for; its plan is of all positions' logits."""

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
        found = program_launches(plan, self.depth)
        return [each for each in found if plan.stages[each.first].kind != "head"]


def program_path(folder: Path, direction: str, number: int) -> Path:
    """Where one of a set lies."""
    return folder / f"{direction}-{number}.mlpackage"


def compile_set(shape: Shape, weights: dict[str, Any], folder: Path) -> dict[str, float]:
    """Write forward and backward programs of every launch; how many, and the seconds."""
    from onelaunch.engines.coreml.backward import emit_backward
    from onelaunch.engines.coreml.emit import emit, save
    from onelaunch.engines.coreml.pack import Packed

    start, plan, packed = time.perf_counter(), shape.plan, Packed(shape.config, weights)
    found = shape.layer_launches()
    for number, launch in enumerate(found):
        save(emit(plan, launch, packed, shape.taps), program_path(folder, "forward", number))
        backward = emit_backward(plan, launch, packed, shape.taps)
        save(backward, program_path(folder, "backward", number))
    return {"compilations": 2 * len(found), "seconds": time.perf_counter() - start}


class Compiler:
    """The child, from the parent's side; it begins at once and stays until `close`."""

    def __init__(self, shape: Shape, command: tuple[str, ...] = COMMAND) -> None:
        self._shape, self._command = shape, command
        self._child: Child | None = None

    def compile(self, weights: Path, folder: Path) -> dict[str, float]:
        """Have a set compiled into an empty folder; see `compile_set`. Raises RunFailed with the
        reason where it cannot be; the next call begins a new child where this one has ended."""
        if self._child is None or not self._child.alive:
            self.close()
            self._child = Child(self._command)
            self._child.tell(json.dumps(_as_data(self._shape)))
        child = self._child
        line = ""
        if child.tell(json.dumps({"weights": str(weights), "folder": str(folder)})):
            line = child.hear()
        try:
            answer = json.loads(line)
        except ValueError:
            raise RunFailed(f"the compiler ended ({child.reason()})") from None
        if "failed" in answer:
            raise RunFailed(f"a program does not compile: {answer['failed']}")
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.end()
            self._child = None


def _as_data(shape: Shape) -> dict[str, Any]:
    return {**vars(shape), "config": shape.config.to_dict()}


def _work(shape: Shape, job: dict[str, str]) -> str:
    from safetensors.torch import load_file

    try:
        weights = load_file(job["weights"])
        return json.dumps(compile_set(shape, weights, Path(job["folder"])))
    except Exception as error:  # whatever coremltools raises
        reason = str(error).strip() or type(error).__name__
        return json.dumps({"failed": reason[:_REASON_LETTERS]})


def main() -> None:
    """In the child process."""
    lower_priority()
    lines = lines_of_parent()
    # what a compiler may print is no answer
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)
        with suppress(BrokenPipeError, KeyboardInterrupt):
            data = json.loads(lines.get())
            shape = Shape(**{**data, "config": ModelConfig.from_dict(data["config"])})
            while True:
                print(_work(shape, json.loads(lines.get())), file=answers, flush=True)


if __name__ == "__main__":
    main()
