"""The compiled program: what it is made from, for which processor, and how it is called.

There are two, one that generates and one that trains. Each serves every model: shapes, depth, dtype
and sequences are values in tables. They are plain object code, loaded by LLVM: to run them neither
Numba nor a compiler is needed.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from onelaunch.compilation.cache import program_key
from onelaunch.engines.cpu.layout import SYMBOL, Operation
from onelaunch.engines.cpu.training.layout import Call

GENERATION, TRAINING = "generation", "training"

_ENTRY = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 5)  # called without the interpreter's lock


@cache
def options() -> dict[str, Any]:
    """All that the object code depends on except its source: processor, vector width, compilers."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    triple = llvm.get_process_triple()
    lanes, registers = 4, 16
    if triple.startswith(("aarch64", "arm64")):
        registers = 32
    elif features.get("avx512f") and features.get("avx512vl"):
        lanes, registers = 16, 32
    elif features.get("avx"):
        lanes = 8
    return {
        "triple": triple,
        "cpu": llvm.get_host_cpu_name(),
        "features": features.flatten(),
        "lanes": lanes,
        "registers": registers,
        "llvmlite": metadata.version("llvmlite"),
        "numba": metadata.version("numba"),
    }


@cache
def source(name: str = GENERATION) -> bytes:
    """The text of everything that a program is compiled from."""
    here = Path(__file__).parent
    if name == TRAINING:
        files = [here / "native" / "vectors.py", here / "training" / "layout.py"]
        files += sorted((here / "native" / "training").glob("*.py"))
    else:
        files = [here / "layout.py", *sorted((here / "native").glob("*.py"))]
    return b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)


def key(name: str = GENERATION) -> str:
    """The program's key in a store."""
    return program_key(source(name), options())


def compiler(name: str = GENERATION) -> list[str]:
    """The command that compiles a program, but for where to."""
    return [sys.executable, "-m", "onelaunch.engines.cpu.native.build", name]


class Loaded:
    """Object code in memory, ready to be called."""

    def __init__(self, code: bytes) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_triple(llvm.get_process_triple())
        machine = target.create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.call = _ENTRY(self._engine.get_function_address(SYMBOL))


class Program(Loaded):
    """The program that generates."""

    def __init__(self, code: bytes) -> None:
        super().__init__(code)
        self.lanes = int(self.call(Operation.SHAPE, 0, 0, 0))
        self.tile = int(self.call(Operation.SHAPE, 0, 1, 0))


class TrainingProgram(Loaded):
    """The program that computes gradients."""

    def __init__(self, code: bytes) -> None:
        super().__init__(code)
        self.lanes = int(self.call(Call.SHAPE, 0, 0, 0))
