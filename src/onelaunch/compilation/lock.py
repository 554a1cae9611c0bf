"""A lock per program, so that one of the processes that share a store compiles it."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from onelaunch.compilation.cache import Store

try:
    import fcntl
except ImportError:  # on Windows several may compile at once; the last one is stored
    fcntl = None  # type: ignore[assignment]


class CompileLock:
    """The lock of one key of a store. It is held as long as any process has `descriptor` open: a
    child that inherits it holds it after its parent has ended."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        digest = hashlib.sha256(key.encode("utf-8")).hexdigest()
        self._path = store.folder / f".{digest}.lock"
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        """Try to take the lock, without waiting. Raises OSError if the store cannot be written."""
        self._store.make_folder()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self._path, flags, 0o600)
        if not self._take(descriptor):
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        return True

    def _take(self, descriptor: int) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        # the previous holder may have removed the file after it was opened here
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self.descriptor is None:
            return
        with suppress(OSError):
            os.unlink(self._path)
        os.close(self.descriptor)
        self.descriptor = None
