"""Tiny programs for tests, built, saved and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.emit import write
from onelaunch.engines.coreml.package import Package

DTYPES = {"float16": "fp16", "float32": "fp32", "int32": "int32", "bool": "bool"}


def value(*shape: int, dtype: str = "float16") -> tuple[str, tuple[int, ...]]:
    """An input."""
    return dtype, shape


def state(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "state", shape


def built(folder: Path, body: Callable[..., Any], *inputs: tuple[str, tuple[int, ...]]) -> Path:
    """The package of a function of coremltools' builder, whose parameters are named after those of
    `body`."""
    ct = coremltools("a test")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [
        mb.StateTensorSpec(shape, types.fp16)
        if dtype == "state"
        else mb.TensorSpec(shape, getattr(types, DTYPES[dtype]))
        for dtype, shape in inputs
    ]
    program = mb.program(input_specs=specs, opset_version=ct.target.iOS18)(body)
    path = folder / "tiny.mlpackage"
    write(program, path)
    return path


def read(folder: Path, body: Callable[..., Any], *inputs: tuple[str, tuple[int, ...]]) -> Package:
    return Package(built(folder, body, *inputs))


def model_file(path: Path) -> Path:
    return path / "Data" / "com.apple.CoreML" / "model.mlmodel"


def weight_file(path: Path) -> Path:
    return path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"


def edited(path: Path, edit: Callable[[Any], None]) -> Package:
    """A package whose protobuf `edit` has changed."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString(model_file(path).read_bytes())
    edit(spec)
    model_file(path).write_bytes(spec.SerializeToString(deterministic=True))
    return Package(path)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
