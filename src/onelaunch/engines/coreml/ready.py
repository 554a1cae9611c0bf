"""A saved program, ready to be called with tensors: by Core ML on a Mac, elsewhere evaluated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from onelaunch.engines.coreml import run
from onelaunch.engines.coreml.evaluate import Evaluator, Precision
from onelaunch.engines.coreml.package import Package, Type

OnOutput = Callable[[str, Tensor], None]
"""Called with an output's name and value as soon as it is there."""


class ReadyProgram(Protocol):
    """A program in a process that can call it, until `close`."""

    @property
    def inputs(self) -> Mapping[str, Type]:
        """Its inputs by name."""

    def __call__(
        self, inputs: Mapping[str, Tensor], on_output: OnOutput | None = None
    ) -> dict[str, Tensor]:
        """Its outputs by name, float32 where the program's are float16."""

    def close(self) -> None:
        """Give its memory back."""


class Evaluated:
    """A program that PyTorch evaluates on the CPU, operation by operation. Each output is there
    when its operation is done."""

    def __init__(self, package: Path, precision: Precision) -> None:
        self.evaluator = Evaluator(Package(package), precision)
        self.inputs: Mapping[str, Type] = self.evaluator.function.inputs

    def __call__(
        self, inputs: Mapping[str, Tensor], on_output: OnOutput | None = None
    ) -> dict[str, Tensor]:
        return self.evaluator(inputs, on_output)

    def close(self) -> None:
        """Nothing to release."""


class RunByCoreML:
    """A program that Core ML runs, in a child process of its own. All outputs come at once."""

    def __init__(self, package: Path, log: Callable[[str], None]) -> None:
        self._runner = run.Runner(package, backend=run.CORE_ML)
        self._runner.__enter__()
        weakref.finalize(self, self._runner.close)
        for note in self._runner.notes:
            log(f"Core ML: {note}")
        self.inputs: Mapping[str, Type] = self._runner.inputs

    def __call__(
        self, inputs: Mapping[str, Tensor], on_output: OnOutput | None = None
    ) -> dict[str, Tensor]:
        arrays = self._runner.predict({name: each.numpy() for name, each in inputs.items()})
        outputs = {name: torch.from_numpy(each) for name, each in arrays.items()}
        if on_output is not None:
            for name, output in outputs.items():
                on_output(name, output)
        return outputs

    def close(self) -> None:
        """End the child process."""
        self._runner.close()


class Opener:
    """Makes saved programs ready. `log` gets the notes about them, each line once.

    `precision` "float16" is how a program's operations round: Core ML runs it where it is there.
    "float32" is the evaluator's, for checking, on a Mac too.
    """

    def __init__(self, precision: Precision, log: Callable[[str], None]) -> None:
        self.precision, self._log = precision, log
        self.runs = precision == "float16" and run.why_not() is None
        """Whether Core ML runs the programs."""
        self._logged: set[str] = set()

    def __call__(self, package: Path) -> ReadyProgram:
        if self.runs:
            return RunByCoreML(package, self._log_once)
        return Evaluated(package, self.precision)

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self._log(line)
