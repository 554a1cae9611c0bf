"""CUDA C++ compiled at run time and launched, through NVIDIA's own Python bindings, which come with
PyTorch's CUDA build."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onelaunch.compilation.cache import Store, program_key
from onelaunch.errors import RunFailed


def why_not() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        from cuda.bindings import nvrtc

        _checked(nvrtc.nvrtcVersion())
    except ImportError:
        return "the package cuda-bindings is not installed"
    except Exception as error:  # whatever a library that cannot be loaded raises
        return f"NVRTC cannot be used: {error}"
    return None


def compiled(
    source: str, macros: Mapping[str, object], arch: str, store: Store | None = None
) -> bytes:
    """The machine code of a source for an architecture ("sm_90a"); from the store where it is
    there. Raises RunFailed where the compiler refuses it."""
    from cuda.bindings import nvrtc

    options = [
        "--std=c++17",
        "--device-as-default-execution-space",
        f"--gpu-architecture={arch}",
        *(f"-D{name}={value}" for name, value in sorted(macros.items())),
    ]
    version = [int(part) for part in _checked(nvrtc.nvrtcVersion())]
    key = program_key(source, {"options": options, "nvrtc": version})
    if store is not None and (stored := store.get(key)) is not None:
        return stored
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RunFailed(f"NVRTC: {log.decode(errors='replace').strip()}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if store is not None:
        store.put(key, code)
    return code


class Function:
    """A kernel of some machine code, loaded on a device; one CTA has `shared_bytes`."""

    def __init__(self, code: bytes, name: str, device: torch.device, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self.shared_bytes = shared_bytes
        self._index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # a new thread has no context before its first call
            self._module = _checked(driver.cuModuleLoadData(code))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
            attribute = driver.CUfunction_attribute
            limit = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def launch(self, ctas: int, threads: int, arguments: Arguments) -> None:
        """Launch it on the current stream, all CTAs at once or not at all."""
        from cuda.bindings import driver

        current = torch.cuda.current_device()
        if current != self._index:
            torch.cuda.set_device(self._index)
        try:
            stream = torch.cuda.current_stream(self._index).cuda_stream
            _checked(
                driver.cuLaunchCooperativeKernel(
                    self._function, ctas, 1, 1, threads, 1, 1, self.shared_bytes, stream,
                    arguments.address,
                )
            )  # fmt: skip
        finally:
            if current != self._index:
                torch.cuda.set_device(current)


POINTER, INT, UINT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
LONG, FLOAT = ctypes.c_uint64, ctypes.c_float


class Arguments:
    """A kernel's arguments, ctypes, at `address` as the driver reads them with each launch: their
    values may change in between."""

    def __init__(self, places: Sequence[Any]) -> None:
        self.places = list(places)
        self._at = (ctypes.c_void_p * len(self.places))(*map(ctypes.addressof, self.places))
        self.address = ctypes.addressof(self._at)

    def set(self, first: int, values: Sequence[float]) -> None:
        """The values of some, from number `first` on."""
        for place, value in zip(self.places[first:], values, strict=False):
            place.value = value


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Structure:
    """A structure of tensors' addresses, 0 where there is none: an argument of a launch."""
    at = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _addresses(len(tensors))(*at)


@cache
def _addresses(n: int) -> type[ctypes.Structure]:
    fields = [(f"_{i}", ctypes.c_uint64) for i in range(n)]
    return type("Addresses", (ctypes.Structure,), {"_fields_": fields})


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call returns; raises RunFailed for an error."""
    error, *values = result
    if int(error) != 0:
        raise RunFailed(f"CUDA: {error.name}")
    if len(values) > 1:
        return values
    return values[0] if values else None
