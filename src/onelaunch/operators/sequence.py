"""Allocate the results of an operator and launch its kernels, in one call of a C extension.

An operator that takes 2 us on a GPU is bound by the host, and in a thread that has just woken up,
such as autograd's, a line of Python takes twice as long as elsewhere. So once its shapes are known,
the work of a call is recorded as data for a small extension in C, which calls Python for the empty
tensors and their addresses, and the driver for the launches. It is compiled like Triton's
launchers, by the same C compiler, and cached with them; if that fails, and on other devices, a
Python twin does the same.
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
from onelaunch.operators.triton_cache import verified

Step = tuple[Callable[..., None], tuple[int, ...]]
"""A launch, and the indices of the tensors that it takes."""


def sequence(
    n_inputs: int, empty: Sequence[Empty], steps: Sequence[Step], results: tuple[int, ...]
) -> Callable[..., Any]:
    """Make a function of `n_inputs` tensors that allocates those of `empty`, numbered after the
    inputs, launches the steps, and returns the results: a tensor, or a tuple of several."""
    twin = python_twin(n_inputs, empty, steps, results)
    handles = [launch.handle for launch, _ in steps if isinstance(launch, Bound) and launch.handle]
    extension = _extension() if len(handles) == len(steps) and make_on_current_gpu else None
    if extension is None:
        return twin
    launches = tuple(
        handle.as_tuple(tensors) for handle, (_, tensors) in zip(handles, steps, strict=True)
    )
    run: Callable[..., Any] = extension.Sequence(
        n_inputs,
        make_on_current_gpu,
        tuple(one.spec for one in empty),
        launches,
        results,
        data_ptr,
        current_device,
        current_stream,
        handles[0].device,
        twin,
        _launch_kernel_ex(),
    )
    return run


def python_twin(
    n_inputs: int, empty: Sequence[Empty], steps: Sequence[Step], results: tuple[int, ...]
) -> Callable[..., Any]:
    """The plain form of `sequence`, in Python."""

    def run(*tensors: Tensor) -> Any:
        numbered = (*tensors, *(make() for make in empty))
        for launch, indices in steps:
            launch(*(numbered[i] for i in indices))
        if len(results) == 1:
            return numbered[results[0]]
        return tuple(numbered[i] for i in results)

    return run


def backward_in_c(fallback: Callable[..., Any]) -> Callable[..., Any] | None:
    """Make the `apply` of an autograd.Function's node that looks up `recent_backward` in C.

    `fallback(ctx, dy, x, weight)` serves the calls without a matching entry. Returns None without
    the extension.
    """
    extension = _extension()
    if extension is None:
        return None
    apply: Callable[..., Any] = extension.Backward(
        torch.is_grad_enabled, torch._C._len_torch_dispatch_stack, data_ptr, fallback
    )
    return apply


@cache
def _launch_kernel_ex() -> int:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _extension() -> Any:
    """The C extension, or None if it cannot be compiled: calls are then slower."""
    if torch.version.hip is not None:
        return None
    try:
        return compile_extension()
    except Exception:  # no C compiler, no headers: Triton raises errors of any type
        return None


def compile_extension() -> Any:
    """Compile the C extension, or load it from Triton's cache."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    source = Path(__file__).with_suffix(".c").read_text(encoding="utf-8")
    headers = [str(Path(driver.__file__).with_name("include"))]  # cuda.h
    with verified:
        return compile_module_from_src(source, "onelaunch_sequence", include_dirs=headers)
