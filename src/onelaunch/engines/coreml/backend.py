"""What a child process needs of Core ML, as a protocol, and Core ML itself through coremltools.

coremltools hands arrays of float32 and int32 over to Core ML, and widens what is float16 to float32
in both directions: the rounding of an input to float16 happens within the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.package import FLOAT16, FLOAT32, INT32, Function, Package, Type
from onelaunch.errors import BadInput

Units = Literal["ne", "all", "cpu", "gpu"]
COMPUTE_UNITS: dict[Units, str] = {
    "ne": "CPU_AND_NE",
    "all": "ALL",
    "cpu": "CPU_ONLY",
    "gpu": "CPU_AND_GPU",
}
"""As coremltools calls them."""
HANDED = {FLOAT16: np.float32, FLOAT32: np.float32, INT32: np.int32}
"""The dtypes that coremltools takes and returns for a program's inputs and outputs."""
UNKNOWN = "unknown"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a program, in order, by name."""

    inputs: Mapping[str, Type]
    outputs: Mapping[str, Type]

    @classmethod
    def of(cls, function: Function) -> Interface:
        """Raises BadInput for numbers that coremltools does not hand over."""
        interface = cls(function.inputs, {name: function.types[name] for name in function.outputs})
        for name, each in (*interface.inputs.items(), *interface.outputs.items()):
            if each.dtype not in HANDED:
                raise BadInput(f"{name}: numbers of {each.dtype} are not handed to Core ML here")
        return interface


@dataclass(frozen=True)
class PlacedOperation:
    """The device on which Core ML plans to run an operation: "cpu", "gpu" or "ne", or "unknown";
    where it could; and its share of the program's cost as Core ML estimates it."""

    name: str
    kind: str
    device: str
    supported: tuple[str, ...]
    cost: float | None


class Backend(Protocol):
    """Runs one program, in a child process."""

    def load(self, package: Path, folder: Path, units: Units) -> Interface:
        """Make ready to predict. `folder` is there for its files until the child has ended."""

    def predict(self, inputs: dict[str, np.ndarray]) -> tuple[Arrays, float | None]:
        """Outputs of inputs that have the types of HANDED, and the seconds that Core ML's own
        call took, where that is known."""

    def plan(self) -> list[PlacedOperation]:
        """Every operation that is no constant, in order."""


class CoreML:
    """Core ML. Raises MissingExtra and BadInput, and whatever coremltools does."""

    def load(self, package: Path, folder: Path, units: Units) -> Interface:
        if package.suffix != ".mlpackage":
            raise BadInput(f"{package}: its name must end in .mlpackage")
        ct = coremltools("running an ML Program")
        interface = Interface.of(Package(package).main)
        self._units = getattr(ct.ComputeUnit, COMPUTE_UNITS[units])
        # where a child is killed its parent still knows what to delete
        self._compiled = ct.models.utils.compile_model(
            str(package), destination_path=str(folder / "program.mlmodelc")
        )
        # MLModel would only warn where Core ML refuses the program
        self._model = ct.models.CompiledMLModel(self._compiled, compute_units=self._units)
        return interface

    def predict(self, inputs: dict[str, np.ndarray]) -> tuple[Arrays, float | None]:
        outputs = self._model.predict(inputs)
        duration = getattr(self._model._proxy, "get_last_predict_duration_in_nano_seconds", None)
        nanoseconds = duration() if duration is not None else None
        return outputs, None if nanoseconds is None else nanoseconds / 1e9

    def plan(self) -> list[PlacedOperation]:
        from coremltools.models.compute_plan import MLComputePlan

        plan = MLComputePlan.load_from_path(self._compiled, compute_units=self._units)
        operations = plan.model_structure.program.functions["main"].block.operations
        return [_placed(plan, each) for each in operations if each.operator_name != "const"]


def _placed(plan: Any, operation: Any) -> PlacedOperation:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return PlacedOperation(
        name=operation.outputs[0].name if operation.outputs else "",
        kind=operation.operator_name.rsplit(".", 1)[-1],  # of "ios18.conv"
        device=UNKNOWN if usage is None else _device(usage.preferred_compute_device),
        supported=tuple(map(_device, usage.supported_compute_devices)) if usage else (),
        cost=None if cost is None else float(cost.weight),
    )


def _device(device: Any) -> str:
    from coremltools.models import compute_device

    kinds = {
        "ne": compute_device.MLNeuralEngineComputeDevice,
        "gpu": compute_device.MLGPUComputeDevice,
        "cpu": compute_device.MLCPUComputeDevice,
    }
    return next((name for name, kind in kinds.items() if isinstance(device, kind)), UNKNOWN)
