"""Triton's cache of compiled kernels, with checksums.

Triton loads any file in its cache. One that a full disk or a power failure truncated is then a
kernel that hangs, or a library that crashes the process. This cache manager writes a SHA-256 file
with every file: one whose digest differs or is missing counts as absent and is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

DIGEST = ".sha256"
"""Suffix of the file with the digest of another."""


class _Verified:
    """A context in which Triton checks digests, as long as any thread is inside; a cache manager
    that was chosen by TRITON_CACHE_MANAGER stays in use."""

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
"""A context, for any number of threads, in which kernels are compiled or loaded with digests. It
costs 2 us, so it is for first launches only."""


_names_its_files = threading.Lock()


def prepare_triton() -> None:
    """What Triton does once in a process before it finds or compiles a first kernel: a digest of
    all of its own files, 0.3 s, in which other threads run. One that calls this meanwhile waits."""
    with _names_its_files, suppress(Exception):  # of another version: it is then done later
        from triton.experimental.gluon.nvidia import hopper  # noqa: F401 - for every kernel's key
        from triton.runtime.cache import triton_key

        triton_key()


@cache
def _manager() -> type[Any]:
    from triton.runtime.cache import FileCacheManager

    class DigestCacheManager(FileCacheManager):
        """Files of one kernel or library, each with its digest. Files that the user overrides or
        dumps (TRITON_KERNEL_OVERRIDE, TRITON_KERNEL_DUMP) have none."""

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override=override, dump=dump)
            self._of_user = override or dump

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            content = data if isinstance(data, bytes) else str(data).encode()
            path: str = super().put(content, filename)
            if not self._of_user:
                super().put(hashlib.sha256(content).hexdigest(), filename + DIGEST)
            return path

        def get_file(self, filename: str) -> str | None:
            path: str | None = super().get_file(filename)
            return path if path is None or self._of_user or _is_intact(path) else None

        def get_group(self, filename: str) -> dict[str, str] | None:
            path = self.get_file(f"__grp__{filename}")
            if path is None:
                return None
            group: dict[str, str] = json.loads(Path(path).read_text())["child_paths"]
            return group if all(map(_is_intact, group.values())) else None

    return DigestCacheManager


def _is_intact(path: str) -> bool:
    """Return whether the digest of a file matches its content."""
    try:
        digest = Path(path + DIGEST).read_text(encoding="ascii")
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    except (OSError, ValueError):
        return False
