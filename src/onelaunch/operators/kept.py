"""Triton's store of compiled kernels, with digests.

Triton loads whatever lies in its store. A file that a full disk or a power failure cut off is then
a kernel that hangs, or a library that ends the process. Here every file has its SHA-256 beside it:
one that has another, or none, is as good as not there, and is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

DIGEST = ".sha256"
"""How the file that has a file's digest ends."""


class _Verified:
    """While any thread is inside, Triton reads and writes its store with digests; not where a store
    of another kind was asked for (TRITON_CACHE_MANAGER)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._ours = False

    def __enter__(self) -> None:
        from triton import knobs

        with self._lock:
            self._inside += 1
            if self._inside == 1 and knobs.cache.manager_class is None:
                knobs.cache.manager_class = _manager()
                self._ours = True

    def __exit__(self, *raised: object) -> None:
        from triton import knobs

        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._ours:
                knobs.cache.manager_class = knobs.env
                self._ours = False


verified = _Verified()
"""A context, for any number of threads, in which kernels are compiled or read: 2 us to be in it, so
it is for first launches."""


@cache
def _manager() -> type[Any]:
    from triton.runtime.cache import FileCacheManager

    class DigestCacheManager(FileCacheManager):
        """Files of one kernel, or one library, each beside its digest; not those that people put
        in the place of what is compiled, or look at (TRITON_KERNEL_OVERRIDE, _DUMP)."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override=override, dump=dump)
            self._of_people = override or dump

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            content = data if isinstance(data, bytes) else str(data).encode()
            path: str = super().put(content, filename)
            if not self._of_people:
                super().put(hashlib.sha256(content).hexdigest(), filename + DIGEST)
            return path

        def get_file(self, filename: str) -> str | None:
            path: str | None = super().get_file(filename)
            return path if path is None or self._of_people or _is_whole(path) else None

        def get_group(self, filename: str) -> dict[str, str] | None:
            path = self.get_file(f"__grp__{filename}")
            if path is None:
                return None
            group: dict[str, str] = json.loads(Path(path).read_text())["child_paths"]
            return group if all(map(_is_whole, group.values())) else None

    return DigestCacheManager


def _is_whole(path: str) -> bool:
    """Whether a file is what was written, by the digest beside it."""
    try:
        digest = Path(path + DIGEST).read_text(encoding="ascii")
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    except (OSError, ValueError):
        return False
