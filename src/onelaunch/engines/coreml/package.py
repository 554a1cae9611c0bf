"""Reads saved ML Programs: operations, types, constants, weights.

An .mlpackage is a folder: a manifest, a protobuf (`model.mlmodel`) and next to it a file of
weights. In that file each array has a record of 64 bytes: the word 0xDEADBEEF, a dtype, the array's
bytes, and where it begins (8 bytes each, the first two 4).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.engines.coreml import coremltools
from onelaunch.errors import BadInput

SENTINEL = 0xDEADBEEF
FLOAT16, FLOAT32, INT32 = "float16", "float32", "int32"
FLOAT16_MAX = 65_504
_NAMES = {
    1: "bool", 2: "string", 10: FLOAT16, 11: FLOAT32, 12: "float64", 13: "bfloat16", 21: "int8",
    22: "int16", 23: INT32, 24: "int64", 25: "int4", 31: "uint8", 32: "uint16", 33: "uint32",
    34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6", 39: "uint3",
}  # fmt: skip
"""Of the protobuf's types, those that are known here."""
_BLOB_TYPES = {1: FLOAT16, 2: FLOAT32, 3: "uint8", 4: "int8"}
"""Of the weights' types, those that are read here."""
_WEIGHTS = "@model_path/weights/weight.bin"
_MANIFEST = "Manifest.json"
_LARGEST_MODEL = 2**31 - 1
"""Bytes of a protobuf."""


@dataclass(frozen=True)
class Type:
    """The type of a value: a dtype by name, and its extents; of a number or a text none."""

    dtype: str
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape)) or 'number'}"


@dataclass(frozen=True)
class Stored:
    """A constant in the file of weights, at its record."""

    type: Type
    offset: int


Constant = np.ndarray | str | Stored


@dataclass(frozen=True)
class Operation:
    """One that computes: its kind, the names of its inputs by parameter, and its outputs."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[tuple[str, Type], ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of all its inputs."""
        return tuple(name for names in self.inputs.values() for name in names)


@dataclass(frozen=True)
class Function:
    """Operations in order, without constants and states, which are apart. Every name that an
    operation reads is one of an input, a state, a constant or an operation before it."""

    inputs: Mapping[str, Type]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]
    states: Mapping[str, Type]

    @cached_property
    def types(self) -> dict[str, Type]:
        """The types of every value that is no constant and no state."""
        types = dict(self.inputs)
        for operation in self.operations:
            types |= dict(operation.outputs)
        return types


class Package:
    """A saved program. Raises BadInput for what is none, or has parts that are not read here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = _model_file(path)
        coremltools("reading an ML Program")
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model()
        if model.stat().st_size > _LARGEST_MODEL:
            raise BadInput(f"{path}: its model has more bytes than a protobuf can")
        try:
            spec.ParseFromString(model.read_bytes())
        except Exception as error:  # protobuf has its own
            raise BadInput(f"{path}: its model is damaged ({type(error).__name__})") from error
        if spec.WhichOneof("Type") != "mlProgram":
            raise BadInput(f"{path}: is not an ML Program but a {spec.WhichOneof('Type')}")
        self.version: int = spec.specificationVersion
        self.weights_path = model.parent / "weights" / "weight.bin"
        self.functions = {
            name: _function(function, path)
            for name, function in sorted(spec.mlProgram.functions.items())
        }
        if not self.functions:
            raise BadInput(f"{path}: has no function")

    @property
    def main(self) -> Function:
        """The function that runs where none is named."""
        return self.functions.get("main") or next(iter(self.functions.values()))

    @property
    def weight_file_bytes(self) -> int:
        return self.weights_path.stat().st_size if self.weights_path.exists() else 0

    @property
    def n_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def value(self, constant: Constant) -> Any:
        """A constant as an array, or a text. Raises BadInput for weights that are cut off."""
        if not isinstance(constant, Stored):
            return constant
        try:
            with open(self.weights_path, "rb") as file:
                file.seek(constant.offset)
                record = file.read(24)
            word, dtype, n_bytes, start = struct.unpack("<IIQQ", record)
            if word != SENTINEL or _BLOB_TYPES.get(dtype) != constant.type.dtype:
                raise ValueError(f"no record of {constant.type.dtype}")
            kind = np.dtype(_BLOB_TYPES[dtype])
            count = math.prod(constant.type.shape)
            if n_bytes != count * kind.itemsize:
                raise ValueError("another size")
            if start + n_bytes > self.weight_file_bytes:
                raise ValueError("cut off")
            flat = np.memmap(self.weights_path, kind, "r", start, (count,))
        except (OSError, ValueError, OverflowError, struct.error) as error:
            raise BadInput(
                f"{self.weights_path}: its weights at {constant.offset} are damaged ({error})"
            ) from error
        return flat.reshape(constant.type.shape)


def is_package(path: Path) -> bool:
    """Whether a path is a folder that is named or made as a saved program."""
    if not path.is_dir():
        return False
    if path.suffix == ".mlpackage":
        return True
    try:
        return "rootModelIdentifier" in json.loads((path / _MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _model_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        model_file = path / "Data" / str(root)
        there = path.resolve() in model_file.resolve().parents and model_file.is_file()
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: is no .mlpackage (its {_MANIFEST} cannot be read)") from error
    if not there:
        raise BadInput(f"{path}: its model file {root} is missing")
    return model_file


def _function(proto: Any, path: Path) -> Function:
    if proto.opset not in proto.block_specializations:
        raise BadInput(f"{path}: a function has no operations for its version {proto.opset!r}")
    block = proto.block_specializations[proto.opset]
    declared = {each.name: each.type for each in proto.inputs}
    states = {
        name: _type(kind.stateType.wrappedType, path)
        for name, kind in declared.items()
        if kind.WhichOneof("type") == "stateType"
    }
    inputs = {name: _type(kind, path) for name, kind in declared.items() if name not in states}
    constants: dict[str, Constant] = {}
    operations = []
    known = set(declared)
    for op in block.operations:
        if op.type == "const":
            if len(op.outputs) != 1:
                raise BadInput(f"{path}: a constant has {len(op.outputs)} names")
            name = op.outputs[0].name
            constants[name] = _constant(op.attributes["val"], path)
            known.add(name)
            continue
        operation = _operation(op, constants, path)
        for name in operation.operands:
            if name not in known and name not in constants:
                raise BadInput(f"{path}: {operation.name} reads {name!r}, which nothing writes")
        known |= dict(operation.outputs).keys()
        operations.append(operation)
    for name in block.outputs:
        if name not in known or name in states:
            raise BadInput(f"{path}: its output {name!r} is written by nothing")
    return Function(inputs, tuple(block.outputs), tuple(operations), constants, states)


def _operation(op: Any, constants: dict[str, Constant], path: Path) -> Operation:
    """One without its constants: those that are written in place go to `constants`."""
    if op.blocks:
        raise BadInput(f"{path}: {op.type} has a block of its own, which is not read here")
    outputs = tuple((output.name, _type(output.type, path)) for output in op.outputs)
    name = outputs[0][0] if outputs else _own_name(op, path)
    inputs = {}
    for parameter, bound in sorted(op.inputs.items()):
        names = []
        for argument in bound.arguments:
            if argument.WhichOneof("binding") == "name":
                names.append(argument.name)
                continue
            names.append(f"{name}.{parameter}.{len(names)}")
            constants[names[-1]] = _constant(argument.value, path)
        inputs[parameter] = tuple(names)
    return Operation(op.type, name, inputs, outputs)


def _own_name(op: Any, path: Path) -> str:
    """The name of an operation without outputs, such as write_state."""
    if "name" not in op.attributes:
        return str(op.type)
    return str(_constant(op.attributes["name"], path))


def _type(proto: Any, path: Path) -> Type:
    if proto.WhichOneof("type") != "tensorType":
        raise BadInput(f"{path}: a value of type {proto.WhichOneof('type')} is not read here")
    tensor = proto.tensorType
    if tensor.dataType not in _NAMES:
        raise BadInput(f"{path}: numbers of type {tensor.dataType} are not read here")
    shape = []
    for dimension in tensor.dimensions:
        if dimension.WhichOneof("dimension") != "constant":
            raise BadInput(f"{path}: has extents that are not fixed, which are not read here")
        shape.append(int(dimension.constant.size))
    return Type(_NAMES[tensor.dataType], tuple(shape))


def _constant(proto: Any, path: Path) -> Constant:
    kind = _type(proto.type, path)
    if proto.WhichOneof("value") == "blobFileValue":
        if proto.blobFileValue.fileName != _WEIGHTS:
            raise BadInput(
                f"{path}: has weights in {proto.blobFileValue.fileName!r}, not {_WEIGHTS}"
            )
        return Stored(kind, int(proto.blobFileValue.offset))
    tensor = proto.immediateValue.tensor
    field = tensor.WhichOneof("value")
    try:
        if kind.dtype == "string":
            return str(tensor.strings.values[0])
        if field == "bytes":
            values = np.frombuffer(tensor.bytes.values, dtype=kind.dtype)
        else:
            # a list: a protobuf's own sequence wraps numbers that do not fit
            values = np.array(list(getattr(tensor, field).values), dtype=kind.dtype)
        return values.reshape(kind.shape)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise BadInput(f"{path}: a constant of {kind} cannot be read ({error})") from error
