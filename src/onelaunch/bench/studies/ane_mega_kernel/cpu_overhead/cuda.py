"""What cpu-overhead times on a GPU: allocation with and without the caching allocator, copies to
the GPU, events, and a launch of a kernel that does nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl

from onelaunch.bench.core.timing import milliseconds
from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead.cases import (
    BUFFER_BYTES,
    BUFFERS,
    CALLS,
    LOCKS,
    Sample,
    of_each,
    timed,
)
from onelaunch.errors import RunFailed


def groups(device: torch.device) -> Iterator[tuple[str, Mapping[str, Sample]]]:
    """Cases by what they are, each in several ways."""
    yield f"{BUFFERS} buffers on the GPU", _allocations(device)
    yield f"{BUFFERS * BUFFER_BYTES / 1e6:.0f} MB to the GPU", _copies(device)
    yield f"{LOCKS} pairs of events", _events(device)


def launch(device: torch.device) -> Mapping[str, Sample]:
    """A Triton kernel that writes one number, from Python."""
    target = torch.zeros(1, device=device)

    def sample() -> float:
        took = of_each(lambda: _nothing[(1,)](target), CALLS)
        torch.cuda.synchronize(device)
        return took

    return {"a launch by Triton": sample}


@triton.jit
def _nothing(target):  # type: ignore[no-untyped-def]
    tl.store(target, 0.0)


def _allocations(device: torch.device) -> Mapping[str, Sample]:
    torch.zeros(1, device=device)  # the driver's calls below need the context that this makes
    driver = ctypes.CDLL("libcuda.so.1")

    def cached() -> None:
        [torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]

    def by_driver() -> None:
        places = [ctypes.c_uint64() for _ in range(BUFFERS)]
        for place in places:
            _check(driver.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(BUFFER_BYTES)))
        for place in places:
            _check(driver.cuMemFree_v2(place))

    cached()
    return timed({"the caching allocator": cached, "the driver's own": by_driver})


def _check(status: int) -> None:
    if status:
        raise RunFailed(f"the CUDA driver could not allocate or free (status {status})")


def _copies(device: torch.device) -> Mapping[str, Sample]:
    target = torch.empty(BUFFERS * BUFFER_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(BUFFERS * BUFFER_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()

    def copy(source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return timed(
        {
            "from pageable memory": partial(copy, pageable),
            "from pinned memory": partial(copy, pinned),
        }
    )


def _events(device: torch.device) -> Mapping[str, Sample]:
    pairs = [[torch.cuda.Event() for _ in range(2)] for _ in range(LOCKS)]

    def record() -> None:
        for start, end in pairs:
            start.record()
            end.record()

    def sample() -> float:
        took = milliseconds(record)
        torch.cuda.synchronize(device)
        return took

    return {"recorded": sample}
