"""An update whose figures the device may not have given yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A few numbers for the host, and when they are there; None where they are."""
    if values.device.type != "cuda":
        return values, None
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))
    return there, arrived
