"""Compiled Triton kernels, launched through their handles.

`kernel[grid](...)` of Triton 3.6 costs about 13 us of Python a launch; handing pointers to the
compiled kernel's own launcher costs about 0.4. The launcher's arguments are not a public interface,
so this is done with the versions it was run with, and everywhere else the slow way.
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

from onelaunch.operators.kept import verified

data_ptr = Tensor.data_ptr
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# Versions of Triton whose launcher was called in this way, on a device.
KNOWN_LAUNCHERS = ("3.6",)


@dataclass(frozen=True)
class Handle:
    """What the driver's cuLaunchKernelEx is given for one kernel. `parameters` are the kernel's
    own, in its order: the bits of a number, or None for the address of the next tensor."""

    function: int
    programs: int
    threads: int
    shared_bytes: int
    dependent: bool
    parameters: tuple[int | None, ...]
    device: int

    def described(self, tensors: Sequence[int]) -> tuple[Any, ...]:
        """This launch for sequence.c, its tensors numbered."""
        assert len(tensors) == self.parameters.count(None), "a tensor for each of its addresses"
        which = iter(tensors)
        parameters = tuple(
            (next(which), 0) if bits is None else (-1, bits) for bits in self.parameters
        )
        launch = (self.function, self.programs, self.threads, self.shared_bytes, self.dependent)
        return (*launch, parameters)


@dataclass(frozen=True)
class Bound:
    """A kernel bound to its shapes: called with tensors, it launches. Its `handle` where the driver
    may be asked for the same."""

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
    """A function that launches `kernel` on other tensors of the same dtypes, each aligned to 16
    bytes where its predecessor was, on their device and its current stream.

    A kernel's arguments are its tensors, its numbers and its constants, in this order, the
    constants by name; tensors that are None come last and are left out of the calls. `dependent`
    lets it be scheduled before the kernel ahead of it has ended; it must wait for that itself.
    """
    options: dict[str, Any] = {"num_warps": warps}
    if dependent:
        options["launch_pdl"] = True
    device = next(t for t in tensors if t is not None).device
    given = sum(t is not None for t in tensors)
    assert all(t is None for t in tensors[given:]), "tensors that are missing come last"
    rest = (*tensors[given:], *numbers)

    compiling: AbstractContextManager[None] = verified

    def launch(*tensors: Tensor) -> None:
        nonlocal compiling
        with _guard(device), compiling:
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
    # In this order: stream and function between the grid and these, then two scratch buffers, the
    # kernel's metadata, the launch's, two hooks.
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

    values = (*[None] * given, *rest)
    return Bound(launch_handle, handle_of(compiled, values, grid, index, dependent))


def handle_of(
    compiled: Any, values: Sequence[Any], programs: int, device: int, dependent: bool = False
) -> Handle | None:
    """Of a loaded kernel, its arguments before its constants, and a grid. Of a tensor `values` has
    the address, or None where each call brings its own. None where the kernel is of a kind that is
    launched otherwise: several blocks in a cluster, all programs at once, with descriptors or with
    memory of Triton's own."""
    warps, blocks, shared_bytes = compiled.packed_metadata
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if blocks != 1 or getattr(compiled.metadata, "launch_cooperative_grid", False):
        return None
    parameters: list[int | None] = []
    # numbers that are 1, and tensors that are None, are constants too
    for at, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            parameters.append(values[at])
        elif kind in _PACKED:
            parameters.append(int.from_bytes(struct.pack(_PACKED[kind], values[at]), "little"))
        else:
            return None
    scratch = (0, 0)  # addresses of that memory
    return Handle(
        compiled.function,
        programs,
        32 * warps,
        shared_bytes,
        dependent,
        (*parameters, *scratch),
        device,
    )


_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may be scheduled before the one ahead of it has ended: NVIDIA from 9.0."""
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


def _guard(device: torch.device) -> Any:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
