"""Empty tensors made and kernels launched, in one call.

An operator that takes 2 us on a GPU waits for the host; in a thread that has just been woken, as
autograd's is, every line of Python costs twice what it costs elsewhere. So what a call does, once
its shapes are known, is written down, and a small extension in C does it: it asks Python for the
empty tensors and the addresses, and the driver for the launches. It is compiled as Triton compiles
its launchers, by the same C compiler, and kept in the same store; where that fails, and on other
devices, the twin in Python does the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.operators.empty import Empty, make_on_current_gpu
from onelaunch.operators.handles import Bound, current_device, current_stream, data_ptr
from onelaunch.operators.kept import verified

Step = tuple[Callable[..., None], tuple[int, ...]]
"""A launch, and which of the tensors it is called with."""


def sequence(
    given: int, empty: Sequence[Empty], steps: Sequence[Step], results: tuple[int, ...]
) -> Callable[..., Any]:
    """A function of `given` tensors: makes those of `empty`, which are numbered after the given
    ones, launches the steps and returns the results, a tuple where there are several."""
    twin = in_python(given, empty, steps, results)
    handles = [launch.handle for launch, _ in steps if isinstance(launch, Bound) and launch.handle]
    extension = _extension() if len(handles) == len(steps) and make_on_current_gpu else None
    if extension is None:
        return twin
    launches = tuple(
        handle.described(tensors) for handle, (_, tensors) in zip(handles, steps, strict=True)
    )
    made: Callable[..., Any] = extension.Sequence(
        given,
        make_on_current_gpu,
        tuple(one.described for one in empty),
        launches,
        results,
        data_ptr,
        current_device,
        current_stream,
        handles[0].device,
        twin,
        _launch_kernel_ex(),
    )
    return made


def in_python(
    given: int, empty: Sequence[Empty], steps: Sequence[Step], results: tuple[int, ...]
) -> Callable[..., Any]:
    """The plain form of `sequence`."""

    def run(*tensors: Tensor) -> Any:
        every = (*tensors, *(make() for make in empty))
        for launch, which in steps:
            launch(*(every[i] for i in which))
        if len(results) == 1:
            return every[results[0]]
        return tuple(every[i] for i in results)

    return run


def backward_in_c(otherwise: Callable[..., Any]) -> Callable[..., Any] | None:
    """The `apply` of an autograd.Function's node that looks through `recent_backward` as
    `otherwise` does, which serves all that it cannot: called with the context, dY and the two
    saved tensors. None without the extension."""
    extension = _extension()
    if extension is None:
        return None
    made: Callable[..., Any] = extension.Backward(
        torch.is_grad_enabled, torch._C._len_torch_dispatch_stack, data_ptr, otherwise
    )
    return made


@cache
def _launch_kernel_ex() -> int:
    found = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    return ctypes.cast(found, ctypes.c_void_p).value or 0


@cache
def _extension() -> Any:
    """The module in C, or None: without it calls are slower, and the same."""
    if torch.version.hip is not None:
        return None
    try:
        return compile_extension()
    except Exception:  # no C compiler, no headers: whatever Triton raises
        return None


def compile_extension() -> Any:
    """Compile the module in C, or take it from Triton's store."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    source = Path(__file__).with_suffix(".c").read_text(encoding="utf-8")
    headers = [str(Path(driver.__file__).with_name("include"))]  # cuda.h
    with verified:
        return compile_module_from_src(source, "onelaunch_sequence", include_dirs=headers)
