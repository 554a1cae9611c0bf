"""Reads saved ML Programs: operations, types, constants, weights.

An .mlpackage is a folder: a manifest, a protobuf (`model.mlmodel`) and beside it a file of weights.
In that file each array has a record of 64 bytes: the word 0xDEADBEEF, a dtype, the array's bytes,
and where it begins (8 bytes each, the first two 4).
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
FILE_VERSION = 2
FLOAT16, FLOAT32, INT32 = "float16", "float32", "int32"
_NAMES = {
    1: "bool", 2: "string", 10: FLOAT16, 11: FLOAT32, 21: "int8", 22: "int16", 23: INT32,
    31: "uint8",
}  # fmt: skip
"""Of the protobuf's types, those that are read here."""
_BLOB_TYPES = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8}
_MANIFEST = "Manifest.json"


@dataclass(frozen=True)
class Type:
    """Of a value: a dtype by name, and its extents; of a number or a text none."""

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
    """One that computes: its kind, the names of its inputs by parameter, and what it gives."""

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
    """Operations in order, without constants, which are apart."""

    inputs: Mapping[str, Type]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    constants: Mapping[str, Constant]

    @cached_property
    def types(self) -> dict[str, Type]:
        """Of every value that is no constant."""
        found = dict(self.inputs)
        for operation in self.operations:
            found |= dict(operation.outputs)
        return found


class Package:
    """A saved program. Raises BadInput for what is none, or has parts that are not read here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = _model_file(path)
        coremltools("reading an ML Program")
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model()
        try:
            spec.ParseFromString(model.read_bytes())
        except Exception as error:  # protobuf has its own
            raise BadInput(f"{path}: its model is damaged ({type(error).__name__})") from error
        if spec.WhichOneof("Type") != "mlProgram":
            raise BadInput(f"{path}: is not an ML Program but a {spec.WhichOneof('Type')}")
        self.version: int = spec.specificationVersion
        self.weights_path = model.parent / "weights" / "weight.bin"
        self.functions = {
            name: _function(function, path) for name, function in spec.mlProgram.functions.items()
        }

    @property
    def main(self) -> Function:
        """The function that runs where none is named."""
        return self.functions.get("main") or next(iter(self.functions.values()))

    @property
    def weight_file_bytes(self) -> int:
        return self.weights_path.stat().st_size if self.weights_path.exists() else 0

    @property
    def n_bytes(self) -> int:
        """Of all files."""
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
            if word != SENTINEL or dtype not in _BLOB_TYPES:
                raise ValueError("no record")
            kind = np.dtype(_BLOB_TYPES[dtype])
            count = math.prod(constant.type.shape)
            if n_bytes != count * kind.itemsize:
                raise ValueError("another size")
            flat = np.memmap(self.weights_path, kind, "r", start, (count,))
        except (OSError, ValueError, struct.error) as error:
            raise BadInput(
                f"{self.weights_path}: its weights at {constant.offset} are damaged ({error})"
            ) from error
        return flat.reshape(constant.type.shape)


def _model_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        found = path / "Data" / str(root)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: is no .mlpackage (its {_MANIFEST} cannot be read)") from error
    if path.resolve() not in found.resolve().parents or not found.is_file():
        raise BadInput(f"{path}: its model file {root} is missing")
    return found


def _function(proto: Any, path: Path) -> Function:
    block = proto.block_specializations[proto.opset]
    constants: dict[str, Constant] = {}
    operations = []
    for op in block.operations:
        if op.type == "const":
            (output,) = op.outputs
            constants[output.name] = _constant(op.attributes["val"], path)
            continue
        if op.blocks:
            raise BadInput(f"{path}: {op.type} has a block of its own, which is not read here")
        inputs = {}
        for name, given in op.inputs.items():
            names = []
            for argument in given.arguments:
                if argument.WhichOneof("binding") == "name":
                    names.append(argument.name)
                    continue
                names.append(f"{op.outputs[0].name}.{name}.{len(names)}")
                constants[names[-1]] = _constant(argument.value, path)
            inputs[name] = tuple(names)
        outputs = tuple((output.name, _type(output.type, path)) for output in op.outputs)
        operations.append(Operation(op.type, outputs[0][0], inputs, outputs))
    given = {each.name: _type(each.type, path) for each in proto.inputs}
    return Function(given, tuple(block.outputs), tuple(operations), constants)


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
        return Stored(kind, int(proto.blobFileValue.offset))
    tensor = proto.immediateValue.tensor
    field = tensor.WhichOneof("value")
    if kind.dtype == "string":
        return str(tensor.strings.values[0])
    if field == "bytes":
        values = np.frombuffer(tensor.bytes.values, dtype=kind.dtype)
    else:
        values = np.array(getattr(tensor, field).values, dtype=kind.dtype)
    if values.size == 1:
        return np.broadcast_to(values.reshape(()), kind.shape)
    return values.reshape(kind.shape)
