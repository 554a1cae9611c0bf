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
    each waits for one turn of the other. One that nobody waits for costs the host 0.5 us."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._taken = False
        self._queue: deque[_Waiting] = deque()

    def turn(self) -> Turns:
        """A context in which nobody else has a turn."""
        return self

    def __enter__(self) -> None:
        mine = None
        try:
            with self._changing:
                if not self._taken:
                    self._taken = True
                    return
                mine = _Waiting()
                self._queue.append(mine)
            mine.told.acquire()
        except BaseException:  # interrupted
            if mine is not None:
                self._leave(mine)
            raise

    def __exit__(self, *raised: object) -> None:
        self._hand_over()

    def _hand_over(self) -> None:
        with self._changing:
            if self._queue:
                first = self._queue.popleft()
                first.has_it = True
                first.told.release()
            else:
                self._taken = False

    def _leave(self, mine: _Waiting) -> None:
        with self._changing, suppress(ValueError):
            self._queue.remove(mine)
        if mine.has_it:
            self._hand_over()


class _Waiting:
    """One who waits until `told` is released."""

    def __init__(self) -> None:
        self.has_it = False
        self.told = threading.Lock()
        self.told.acquire()


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
