"""Kernels with their arguments, launched one by one or captured as a CUDA graph."""

from __future__ import annotations

import contextvars
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from onelaunch.compilation.child import usable_cores
from onelaunch.operators.handles import KNOWN_LAUNCHERS, current_device, current_stream
from onelaunch.operators.triton_cache import prepare_triton, verified

Launch = Callable[[Any, Any], None]
"""Called with ids, (N,), int64, and logits, (rows, V); or with None for the call's own."""


@dataclass(frozen=True)
class Call:
    """A kernel, its grid, its arguments in order, tuples among them, and its options. To call it
    launches it on the current device and its current stream."""

    kernel: Any
    ctas: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    launches: ClassVar[int] = 1

    def __call__(self) -> None:
        self._launch(None, None)

    @cached_property
    def _launch(self) -> Launch:
        return launcher(self, None, None)

    def with_tensor(self, old: Tensor | None, new: Tensor) -> Call:
        """The same with another tensor in the place of one of its arguments."""
        return replace(
            self, arguments=tuple(new if a is old is not None else a for a in self.arguments)
        )

    def compile(self) -> Any:
        """The compiled kernel; nothing is launched."""
        with verified:
            return self.kernel.warmup(*self.arguments, grid=(self.ctas,), **self.options)

    def load(self) -> Any:
        """The compiled kernel, on its device; nothing is launched. Raises the driver's error
        where it does not fit."""
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
    """A context with a GPU as the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def captured(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture what a function launches, whose kernels are loaded, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    # other threads may launch and copy meanwhile, though not wait for the device
    with torch.cuda.graph(graph, stream=_capturing(device), capture_error_mode="thread_local"):
        run()
    return graph


@cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on."""
    return torch.cuda.Stream(device)


def compile_together(calls: Sequence[Call | CallAndProduct]) -> None:
    """Compile what is not compiled yet, several kernels at once. An error is left to whoever loads
    the kernel."""
    from triton import AsyncCompileMode

    def compile_all() -> None:
        prepare_triton()
        with ThreadPoolExecutor(max(2, min(8, usable_cores() - 1))) as pool, verified:
            with suppress(Exception), AsyncCompileMode(pool, ignore_errors=True):
                for call in calls:
                    call.compile()

    # Triton's mode stays set where an interrupt ends it: in a context of its own it does not
    contextvars.copy_context().run(compile_all)


def prefer_shared_memory(compiled: Any) -> None:
    """Have a multiprocessor give its L1 to shared memory, as much as it can, for a kernel that is
    loaded. Between kernels that want it divided in different ways a multiprocessor must run
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


def launcher(call: Call, ids_N: Tensor | None, logits: Tensor | None) -> Launch:
    """A function that launches a call, on the current device and its current stream, with other
    tensors in the place of `ids_N` and `logits`: through the compiled kernel's handle where
    Triton's launcher is known (operators/handles.py)."""

    def by_triton(ids: Any, to: Any) -> None:
        others = call if ids is None else call.with_tensor(ids_N, ids).with_tensor(logits, to)
        others.kernel[(others.ctas,)](*others.arguments, **others.options)

    if not _known(call.kernel):
        return by_triton
    compiled = call.load()
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return by_triton
    index, options = current_device(), call.options
    # stream and function stand between the grid and these: two scratch buffers, the kernel's
    # metadata, the launch's, two hooks
    flags = (
        options.get("launch_cooperative_grid", False), options.get("launch_pdl", False), None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    named = call.kernel.arg_names[len(call.arguments) :]
    kernel_args = [*call.arguments, *(options[name] for name in named)]
    head = [call.ctas, 1, 1, None, compiled.function, *flags]
    of_ids = [len(head) + i for i, value in enumerate(kernel_args) if value is ids_N is not None]
    of_logits = [
        len(head) + i for i, value in enumerate(kernel_args) if value is logits is not None
    ]
    values = [*head, *map(_addressed, kernel_args)]
    launch, stream = run.launch, head.index(None)

    def by_handle(ids: Any, to: Any) -> None:
        values[stream] = current_stream(index)
        for i in of_ids:
            values[i] = ids.data_ptr()
        for i in of_logits:
            values[i] = to.data_ptr()
        launch(*values)

    return by_handle


def _addressed(value: Any) -> Any:
    """A kernel's argument with the addresses of tensors on a GPU in their place, in tuples too."""
    if isinstance(value, tuple):
        return tuple(map(_addressed, value))
    on_gpu = isinstance(value, Tensor) and value.device.type == "cuda"
    return value.data_ptr() if on_gpu else value


def _known(kernel: Any) -> bool:
    """Whether a kernel is compiled for an NVIDIA GPU that is there, and its launcher is known."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return isinstance(kernel, triton.JITFunction) and version in KNOWN_LAUNCHERS
