"""Who uses a device: in this process first come, first served; and one measurement of all processes
at a time."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from onelaunch.compilation.cache import Store
from onelaunch.errors import RunFailed

LOOK_SECONDS = 0.1


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
    """A device's turns, for every engine in this process."""
    return Turns()


LOADING = threading.Lock()
"""Held, within a turn, to load kernels or to capture a graph: two threads must not do so at once,
not even on two devices."""


@contextmanager
def measuring_alone(
    store: Store, device: torch.device, cancelled: Callable[[], bool], seconds: float
) -> Iterator[None]:
    """Be the only one, of all processes with this store, that measures on a device, where the
    system has locks for that. Raises RunFailed where it is cancelled while another one measures, or
    that takes more than some seconds."""
    descriptor = _lock_file(store, device)
    end = time.monotonic() + seconds
    try:
        while descriptor is not None and _is_taken(descriptor):
            if cancelled():
                raise RunFailed("cancelled")
            if time.monotonic() > end:
                raise RunFailed("another process is measuring on this device")
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_file(store: Store, device: torch.device) -> int | None:
    if store.unusable is not None:
        return None
    # processes may see different devices as their first
    name = f"measuring-{torch.cuda.get_device_properties(device).uuid}.lock"
    with suppress(OSError):
        store.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(store.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    return None


def _is_taken(descriptor: int) -> bool:
    """Whether another one has the lock; else it is taken now, until the file is closed."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # a system or a file system without locks
        return False
    return False
