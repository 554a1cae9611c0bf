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
    each waits for one turn of the other. Not reentrant. Uncontended it costs the host 0.5 us.

    An interrupt (KeyboardInterrupt) may end a turn early, or leave one without its release. The
    next request repairs the queue, and the thread that holds the turn gets it again.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._owner: _Ticket | None = None
        self._queue: deque[_Ticket] = deque()

    def turn(self) -> Turns:
        """A context in which no other thread has a turn."""
        return self

    def __enter__(self) -> None:
        mine = _Ticket(threading.get_ident())
        try:
            with self._changing:
                self._wake_owner()
                if self._owner is None or self._owner.thread == mine.thread:
                    self._owner = mine
                    return
                mine.granted.acquire()
                self._queue.append(mine)
            mine.granted.acquire()
        except BaseException:  # interrupted
            self._leave(mine)
            raise

    def __exit__(self, *raised: object) -> None:
        me = threading.get_ident()
        try:
            self._hand_over(me)
        except BaseException:  # interrupted: once more, which changes nothing that was done
            self._hand_over(me)
            raise

    def _hand_over(self, thread: int) -> None:
        with self._changing:
            if self._owner is not None and self._owner.thread == thread:
                self._owner = self._queue[0] if self._queue else None
            self._wake_owner()

    def _leave(self, mine: _Ticket) -> None:
        with self._changing:
            if self._owner is mine:
                with suppress(ValueError):
                    self._queue.remove(mine)
                self._owner = self._queue[0] if self._queue else None
            elif mine in self._queue:
                self._queue.remove(mine)
            self._wake_owner()

    def _wake_owner(self) -> None:
        """Wake the owner where it still waits in the queue."""
        if self._queue and self._owner is self._queue[0]:
            with suppress(RuntimeError):  # it is released already
                self._queue[0].granted.release()
            self._queue.popleft()


class _Ticket:
    """A thread's request for a turn; it waits until `granted` is released."""

    __slots__ = ("granted", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.granted = threading.Lock()


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
