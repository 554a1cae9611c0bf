"""Copies to and from the device that do not wait for it, and an update whose figures are still on
their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class PendingUpdate(NamedTuple):
    """The figures, which may be on their way until an event; what reads its times; the rest of its
    record; and how many micro-steps and tokens these are of."""

    record: dict[str, Any]
    values: tuple[Tensor, torch.cuda.Event | None]
    seconds: Callable[[], dict[str, float]]
    micro_steps: int
    tokens: int


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Integers of one shape on a device; on a GPU as int64, and they may still be on their way."""
    if device.type != "cuda":
        return tuple(torch.from_numpy(array).to(device) for array in arrays)
    # pinned, or the copy waits for what was launched before it
    pinned = torch.empty((len(arrays), *arrays[0].shape), dtype=torch.int64, pin_memory=True)
    for to, array in zip(pinned, arrays, strict=True):
        to.copy_(torch.from_numpy(array))
    return pinned.to(device, non_blocking=True).unbind()


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A few numbers for the host, and when they are there; None where they are."""
    if values.device.type != "cuda":
        return values, None
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))
    return there, arrived
