"""Runs a saved ML Program with Core ML, in a child process: a program that the Neural Engine's
compiler has refused loads all the same, and its first prediction kills the process.

Where compute units fail, by an error, a signal or a hang, the next ones are tried, and a note is
kept.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from onelaunch.compilation.children import Child
from onelaunch.engines import coreml
from onelaunch.engines.coreml.backend import HANDED, PlacedOperation, Units
from onelaunch.engines.coreml.child import read_interface
from onelaunch.engines.coreml.package import INT32, Type
from onelaunch.engines.coreml.shared import WIDEST, Shared
from onelaunch.errors import BadInput, RunFailed

OLDEST_MACOS = 15
"""The first that knows the operations of the programs that are emitted here."""
CORE_ML = "onelaunch.engines.coreml.backend:CoreML"
COMMAND = (sys.executable, "-m", "onelaunch.engines.coreml.child")
NAMES: dict[Units, str] = {
    "ne": "CPU and Neural Engine",
    "all": "all compute units",
    "cpu": "CPU alone",
    "gpu": "CPU and GPU",
}
ORDER: dict[Units, tuple[Units, ...]] = {
    "ne": ("ne", "gpu", "cpu"),
    "all": ("all", "gpu", "cpu"),
    "gpu": ("gpu", "cpu"),
    "cpu": ("cpu",),
}
"""Compute units that are tried, by the requested ones."""
COMPILER_WORDS = ("ANECCompile", "MILCompilerForANE")
"""In what is written where the Neural Engine's compiler has failed, whether or not loading has."""
GRACE_SECONDS = 5.0
"""After its time a child whose parent is gone ends by itself."""


def why_not() -> str | None:
    """Why programs cannot be run here, and what can be done with them; None where they can."""
    instead = "here a program can be exported, linted and evaluated, not run"
    if platform.system() != "Darwin":
        return f"Core ML runs on macOS {OLDEST_MACOS} or later; {instead}"
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0] or 0) < OLDEST_MACOS:
        return f"Core ML runs these programs on macOS {OLDEST_MACOS} or later, not on {version}"
    if (reason := coreml.why_not()) is not None:
        return f"{reason}; pip install 'onelaunch[coreml]'"
    if not _has_native_part():
        return "coremltools was installed without its part that calls Core ML; " + instead
    return None


def _has_native_part() -> bool:
    spec = find_spec("coremltools")
    places = spec.submodule_search_locations if spec is not None else None
    return any(list(Path(place).glob("libcoremlpython*.so")) for place in places or ())


@dataclass(frozen=True)
class Times:
    """Seconds of one prediction; the four add up to what its caller waited."""

    input_conversion: float
    """To arrays that coremltools takes: float32 and int32, contiguous; nothing where they are."""
    prediction: float
    """coremltools' call."""
    output_conversion: float
    transfer: float
    """All else: copies into and out of shared memory, and messages between the processes."""
    core_ml: float | None = None
    """Within `prediction`, Core ML's own call where that is known: it rounds inputs to float16. The
    rest is coremltools', which widens outputs to float32."""

    @property
    def total(self) -> float:
        return self.input_conversion + self.prediction + self.output_conversion + self.transfer


@dataclass(frozen=True)
class ComputePlan:
    """The devices on which Core ML plans to run each operation. Where they ran is not known."""

    operations: tuple[PlacedOperation, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Operations by device, most first."""
        return dict(Counter(each.device for each in self.operations).most_common())


class Runner:
    """A saved program that is ready to predict while the `with` block lasts. For one thread.

    On entry it is loaded, and a first prediction is made, of zeros. Where either fails on the
    requested compute units, the next ones of ORDER are tried, with a line in `notes`.
    `load_timeout` is for loading and for `plan`, `predict_timeout` for a prediction, in seconds.
    Raises BadInput for a package that cannot be read, RunFailed where it runs nowhere.
    """

    def __init__(
        self,
        package: Path,
        units: Units = "ne",
        load_timeout: float = 600.0,
        predict_timeout: float = 60.0,
        backend: str = CORE_ML,
    ) -> None:
        if units not in ORDER:
            raise BadInput(f"compute units {units!r}: must be {', '.join(ORDER)}")
        self.package = package
        self.units: Units = units
        """Those that are in use."""
        self.notes: list[str] = []
        """A line for each thing that differs from the request."""
        self.load_seconds = self.first_seconds = 0.0
        """Compiling and loading, in the child; the first prediction, as its caller waited."""
        self.times: Times | None = None
        """Of the last prediction."""
        self.inputs: Mapping[str, Type] = {}
        self.outputs: Mapping[str, Type] = {}
        self._load_timeout, self._predict_timeout = load_timeout, predict_timeout
        self._backend = backend
        self._worker: _Worker | None = None
        self._shared: Shared | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Runner:
        if self._backend == CORE_ML and (reason := why_not()) is not None:
            raise RunFailed(f"{self.package}: {reason}")
        try:
            self._start(ORDER[self.units])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, and all that was made for it."""
        if self._worker is not None:
            self._worker.end()
        if self._shared is not None:
            self._shared.forget_name()
            self._shared.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._worker = self._shared = self._folder = None

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The program's outputs by name, float32 where the program's are float16. Inputs are of any
        real type; Core ML rounds them to the program's. Raises BadInput for inputs that are not the
        program's, RunFailed where the prediction fails; the runner is closed then where its child
        has ended."""
        self._opened()
        for name in inputs:
            if name not in self.inputs:
                raise BadInput(f"input {name}: is none of {', '.join(self.inputs)}")
        fitting = {name: _fitting(name, each, inputs) for name, each in self.inputs.items()}
        return self._predict(fitting, "a prediction")

    def plan(self) -> ComputePlan:
        """Core ML's own plan for the units in use. Raises RunFailed."""
        worker, _ = self._opened()
        answer = self._request(worker, "its compute plan", self._load_timeout, "plan")
        operations = (
            PlacedOperation(**{**each, "supported": tuple(each["supported"])})
            for each in answer["operations"]
        )
        return ComputePlan(tuple(operations))

    def _start(self, order: tuple[Units, ...]) -> None:
        """On the first units of these that can."""
        failures: list[str] = []
        for number, units in enumerate(order):
            self.units = units
            try:
                self._load()
                zeros = {n: np.zeros(t.shape, HANDED[t.dtype]) for n, t in self.inputs.items()}
                self._predict(zeros, "its first prediction")
            except _Broken as error:
                failures.append(error.reason)
                self.close()
            else:
                assert self.times is not None
                self.first_seconds = self.times.total
                self._note_compiler()
                return
            if number + 1 < len(order):
                self.notes.append(f"{failures[-1]}; {NAMES[order[number + 1]]} instead")
            else:
                self.notes.append(failures[-1])
        raise RunFailed(f"{self.package}: does not run here: {'; '.join(failures)}")

    def _load(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="onelaunch-coreml-run-", ignore_cleanup_errors=True
        )
        self._worker = worker = _Worker((*COMMAND, self._backend))
        answer = self._request(
            worker,
            "loading",
            self._load_timeout,
            "load",
            package=str(self.package),
            folder=self._folder.name,
            units=self.units,
        )
        interface = read_interface(answer)
        self.inputs, self.outputs = interface.inputs, interface.outputs
        self.load_seconds = answer["seconds"]
        self._shared = shared = Shared.new(interface)
        try:
            self._request(worker, "loading", self._load_timeout, "share", name=shared.name)
        finally:
            shared.forget_name()

    def _predict(self, inputs: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
        worker, shared = self._opened()
        start = time.perf_counter()
        for name, array in inputs.items():
            np.copyto(shared.input(name, array.dtype.str), array)
        dtypes = {name: array.dtype.str for name, array in inputs.items()}
        answer = self._request(worker, what, self._predict_timeout, "predict", dtypes=dtypes)
        outputs = {name: shared.output(name).copy() for name in self.outputs}
        waited = time.perf_counter() - start
        conversion, prediction, output_conversion = answer["seconds"]
        self.times = Times(
            input_conversion=conversion,
            prediction=prediction,
            output_conversion=output_conversion,
            transfer=waited - sum(answer["seconds"]),
            core_ml=answer["core_ml"],
        )
        return outputs

    def _note_compiler(self) -> None:
        if self._worker is not None and self.units in ("ne", "all"):
            errors = (
                line
                for line in self._worker.stderr_lines()
                if any(w in line for w in COMPILER_WORDS)
            )
            if (line := next(errors, None)) is not None:
                self.notes.append(
                    f"{NAMES[self.units]}: predicts, but the Neural Engine's compiler failed "
                    f"({line}); where it runs is not known"
                )

    def _opened(self) -> tuple[_Worker, Shared]:
        if self._worker is None or self._shared is None:
            raise RunFailed(f"{self.package}: its runner is closed")
        return self._worker, self._shared

    def _request(
        self, worker: _Worker, what: str, seconds: float, do: str, **more: Any
    ) -> dict[str, Any]:
        """The child's response. Where there is none, whatever the reason, the runner is closed."""
        try:
            answer = worker.request(seconds, {"do": do, **more})
        except BaseException as error:
            self.close()
            if not isinstance(error, _NoResponse):
                raise
            answer = {"failed": str(error)}
        if "refused" in answer:
            raise BadInput(answer["refused"])
        if "failed" in answer:
            raise _Broken(self.package, f"{NAMES[self.units]}: {what} failed ({answer['failed']})")
        return answer


class _Broken(RunFailed):
    """Something failed on the units in use."""

    def __init__(self, package: Path, reason: str) -> None:
        super().__init__(f"{package}: {reason}")
        self.reason = reason


class _NoResponse(Exception):
    """Why a child returned no valid response."""


class _Worker(Child):
    def request(self, seconds: float, message: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the response, within `seconds`. Raises _NoResponse; the child
        has ended then, as after any other exception: a late response would be taken for the next
        request's."""
        answer = None
        try:
            self.send(json.dumps({**message, "seconds": seconds + GRACE_SECONDS}))
            if not (line := self.receive_within(seconds)):
                raise _NoResponse(self._last_words())
            answer = _read(line)
        except TimeoutError:
            raise _NoResponse(f"took longer than {seconds:g} s") from None
        finally:
            if answer is None:
                self.end()
        return answer

    def _last_words(self) -> str:
        reason = self.reason()
        lines = self.stderr_lines()
        return reason if not lines or lines[-1] in reason else f"{reason} after: {lines[-1]}"


def _read(line: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise _NoResponse("its process returned an invalid response")
    return answer


def _fitting(name: str, expected: Type, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """An input as it is handed to the child. Raises BadInput where it is not the program's."""
    if name not in inputs:
        raise BadInput(f"input {name}: is missing")
    array = np.asarray(inputs[name])
    if array.shape != expected.shape:
        raise BadInput(f"input {name}: must be of shape {expected.shape}, not {array.shape}")
    whole = array.dtype.kind in "iu"
    if not whole and (array.dtype.kind != "f" or expected.dtype == INT32):
        raise BadInput(f"input {name}: must be {expected.dtype}, not {array.dtype}")
    if array.itemsize > WIDEST:
        array = array.astype(np.float64)
    if whole and expected.dtype == INT32:
        room = np.iinfo(np.int32)
        if array.size and (array.min() < room.min or array.max() > room.max):
            raise BadInput(f"input {name}: has numbers that int32 does not hold")
    return array
