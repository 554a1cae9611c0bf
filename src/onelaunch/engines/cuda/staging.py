"""Token ids on their way from the host to a GPU."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

LEAST_IDS = 256


class Staging:
    """Pinned memory that ids are copied through: the copy to the GPU is then only enqueued, where
    from other memory it may wait for the stream. A buffer is used again when its copy has ended;
    one that is too small by then is let go, so there are no more than copies under way, and one."""

    def __init__(self) -> None:
        self._buffers: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def on_device(self, ids_N: Tensor, device: torch.device) -> Tensor:
        """Ids, (N,), as int64 on a device."""
        if ids_N.dtype is torch.int64 and ids_N.device == device:
            return ids_N
        ids_N = ids_N.to(torch.int64)
        if ids_N.device == device:
            return ids_N
        if ids_N.device.type != "cpu" or device.type != "cuda":
            return ids_N.to(device)
        n = len(ids_N)
        event, buffer = self._free(n)
        buffer[:n].copy_(ids_N)
        copied_N = torch.empty(n, dtype=torch.int64, device=device)
        copied_N.copy_(buffer[:n], non_blocking=True)
        event.record()
        self._buffers.append((event, buffer))
        return copied_N

    def _free(self, n: int) -> tuple[torch.cuda.Event, Tensor]:
        """A buffer of at least `n` ids that no copy reads, out of the queue."""
        while self._buffers and self._buffers[0][0].query():
            event, buffer = self._buffers.popleft()
            if len(buffer) >= n:
                return event, buffer
        size = max(n, LEAST_IDS)
        return torch.cuda.Event(), torch.empty(size, dtype=torch.int64, pin_memory=True)
