"""Launch compiled Triton kernels through their handles.

`kernel[grid](...)` of Triton 3.6 takes about 13 us of Python per launch; calling the launcher of
the compiled kernel with pointers takes about 0.4. The arguments of that launcher are not a public
interface, so it is called only in the Triton versions that were tested, else `kernel[grid](...)`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from onelaunch.operators.triton_cache import verified

data_ptr = Tensor.data_ptr
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# Versions of Triton whose launcher was tested with these arguments, on a GPU.
KNOWN_LAUNCHERS = ("3.6",)


@dataclass(frozen=True)
class Handle:
    """The arguments of the driver's cuLaunchKernelEx for one kernel. `parameters` are those of the
    kernel, in order: the bits of a number, or None for the address of the next tensor."""

    function: int
    grid: int
    threads: int
    shared_bytes: int
    dependent: bool
    parameters: tuple[int | None, ...]
    device: int

    def as_tuple(self, tensors: Sequence[int]) -> tuple[Any, ...]:
        """Return the launch as sequence.c takes it; `tensors` are the numbers of its tensors."""
        assert len(tensors) == self.parameters.count(None), "one tensor per address"
        numbers = iter(tensors)
        parameters = tuple(
            (next(numbers), 0) if bits is None else (-1, bits) for bits in self.parameters
        )
        launch = (self.function, self.grid, self.threads, self.shared_bytes, self.dependent)
        return (*launch, parameters)


@dataclass(frozen=True)
class Bound:
    """A kernel bound to its shapes: calling it with tensors launches it.

    `handle` is the same launch for the driver, where there is one."""

    launch: Callable[..., None]
    handle: Handle | None = None

    def __call__(self, *tensors: Tensor) -> None:
        self.launch(*tensors)


def bind(
    kernel: Any,
    grid: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    constants: dict[str, Any],
    warps: int,
    dependent: bool = False,
) -> Bound:
    """Bind `kernel` to shapes and constants; the result launches it on tensors.

    The tensors of a call must have the dtypes of `tensors`, and 16-byte alignment where those have
    it; the launch goes to their device and its current stream. The arguments of a kernel are its
    tensors, its numbers and its constants, in this order, the constants by name; tensors that are
    None come last and are left out of the calls. `dependent` sets programmatic dependent launch:
    the kernel may start before the previous one has ended, and must wait for it itself.
    """
    options: dict[str, Any] = {"num_warps": warps}
    if dependent:
        options["launch_pdl"] = True
    device = next(t for t in tensors if t is not None).device
    n_tensors = sum(t is not None for t in tensors)
    assert all(t is None for t in tensors[n_tensors:]), "tensors that are None come last"
    rest = (*tensors[n_tensors:], *numbers)

    compiling: AbstractContextManager[None] = verified

    def launch(*tensors: Tensor) -> None:
        nonlocal compiling
        with _device_guard(device), compiling:
            kernel[(grid,)](*tensors, *rest, **constants, **options)
        compiling = nullcontext()

    if not _handles(kernel, device):
        return Bound(launch)
    index = device.index
    with torch.cuda.device(index), verified:
        compiled = kernel.warmup(*tensors, *numbers, grid=(1,), **constants, **options)
        launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return Bound(launch)
    # The arguments after grid, stream and function: flags, two scratch buffers, the metadata of the
    # kernel and of the launch, two hooks.
    flags = (False, dependent, None, None, compiled.packed_metadata, None, None, None)
    numbers_and_constants = (*rest, *constants.values())
    call, function = launcher.launch, compiled.function

    def launch_handle(*tensors: Tensor) -> None:
        pointers = map(data_ptr, tensors)
        if current_device() == index:
            stream = current_stream(index)
            call(grid, 1, 1, stream, function, *flags, *pointers, *numbers_and_constants)
            return
        with torch.cuda.device(index):
            stream = current_stream(index)
            call(grid, 1, 1, stream, function, *flags, *pointers, *numbers_and_constants)

    values = (*[None] * n_tensors, *rest)
    return Bound(launch_handle, handle_of(compiled, values, grid, index, dependent))


def handle_of(
    compiled: Any, values: Sequence[Any], grid: int, device: int, dependent: bool = False
) -> Handle | None:
    """Make the handle of a loaded kernel.

    `values` are its arguments before the constants; for a tensor its address, or None if each call
    passes one. Returns None for kernels that need another launch: with clusters, cooperative, with
    tensor descriptors or with scratch memory.
    """
    warps, blocks, shared_bytes = compiled.packed_metadata
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if blocks != 1 or getattr(compiled.metadata, "launch_cooperative_grid", False):
        return None
    parameters: list[int | None] = []
    # Triton also makes constants of numbers equal to 1 and of None
    for index, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            parameters.append(values[index])
        elif kind in _PACKED:
            parameters.append(int.from_bytes(struct.pack(_PACKED[kind], values[index]), "little"))
        else:
            return None
    scratch = (0, 0)  # null addresses of the scratch memory
    return Handle(
        compiled.function,
        grid,
        32 * warps,
        shared_bytes,
        dependent,
        (*parameters, *scratch),
        device,
    )


_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}


def dependent_launch(device: torch.device) -> bool:
    """Return whether the device has programmatic dependent launch: NVIDIA GPUs from 9.0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(device)[0] >= 9


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _handles(kernel: Any, device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    import triton

    if not isinstance(kernel, triton.JITFunction):
        return False  # interpreted

    return ".".join(triton.__version__.split(".")[:2]) in KNOWN_LAUNCHERS


def _device_guard(device: torch.device) -> Any:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
