"""Kernels with their arguments, launched one by one or captured as a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from onelaunch.operators.kept import verified


@dataclass(frozen=True)
class Call:
    """A kernel, its grid, its arguments in order, its options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    launches: ClassVar[int] = 1

    def __call__(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)

    def with_tensor(self, old: Tensor, new: Tensor) -> Call:
        """The same with another tensor in the place of one of its arguments."""
        return replace(self, arguments=tuple(new if a is old else a for a in self.arguments))

    def compile(self) -> Any:
        """The compiled kernel; nothing is launched."""
        with verified:
            return self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.options)

    def load(self) -> Any:
        """The compiled kernel, on its device; nothing is launched. Raises what the driver says of
        one that does not fit."""
        with verified:
            compiled = self.compile()
            compiled.run  # noqa: B018 - loads it
            return compiled


@dataclass(frozen=True)
class CallAndProduct:
    """A kernel, and then the library's product of two matrices."""

    call: Call
    left: Tensor
    right: Tensor
    to: Tensor
    launches: ClassVar[int] = 2

    def __call__(self) -> None:
        self.call()
        self.multiply(self.to)

    def multiply(self, to: Tensor) -> None:
        """The product alone, into `to`, of the factors' dtype or in float32."""
        if to.dtype == self.left.dtype:
            torch.mm(self.left, self.right, out=to)
        else:
            torch.mm(self.left, self.right, out_dtype=to.dtype, out=to)

    def compile(self) -> Any:
        """The compiled kernel; nothing is launched."""
        return self.call.compile()

    def load(self) -> Any:
        """The compiled kernel, on its device."""
        return self.call.load()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """With a GPU as the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def captured(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """What is launched by a function, whose kernels are loaded, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # other threads may launch and copy meanwhile, though not wait for the device
    with torch.cuda.graph(graph, stream=_capturing(device), capture_error_mode="thread_local"):
        run()
    return graph


@cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on."""
    return torch.cuda.Stream(device)


def share_first_cache(compiled: Any) -> None:
    """Have a multiprocessor give its first cache to shared memory, as much as it can, for a kernel
    that is loaded. Between kernels that want it divided in different ways a multiprocessor must run
    empty: with all of them alike, the stages of a 15-million-parameter model took 138 us in place
    of 158."""
    if torch.version.hip is not None:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # another system's name for it: slower, not wrong
        return
    carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
    driver.cuFuncSetAttribute(ctypes.c_void_p(compiled.function), carveout, 100)
