"""Who uses a device: first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch


class Turns:
    """A lock that goes to whoever has waited longest, so that of two who ask for it all the time
    each waits for one turn of the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        mine = object()
        try:
            with self._changed:
                self._queue.append(mine)
                self._changed.wait_for(lambda: self._queue[0] is mine)
            yield
        finally:
            with self._changed:
                with suppress(ValueError):  # interrupted before it was in the queue
                    self._queue.remove(mine)
                self._changed.notify_all()


@cache
def turns_of(device: torch.device) -> Turns:
    """A device's turns, for every engine in this process: kernels are loaded and graphs captured in
    them, which two threads must not do at once."""
    return Turns()
