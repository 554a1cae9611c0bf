"""A content-addressed cache of compiled programs on disk.

Programs are machine code: files and folders that another user could have written are never read. A
cache that cannot be used acts as an empty one and gives the reason; only time depends on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from onelaunch.checkpoints.atomic import write_error
from onelaunch.compilation import entry
from onelaunch.compilation.entry import About, Damaged
from onelaunch.errors import BadInput

LIMIT_BYTES = 1 << 30
SUFFIX = ".program"
STALE_SECONDS = 3600.0
"""Age from which a temporary file counts as abandoned."""
NOTHING: About = MappingProxyType({})


def program_key(
    program: str | bytes,
    options: Mapping[str, object],
    weights: bytes | Iterable[bytes | bytearray | memoryview] | None = None,
) -> str:
    """Return the key sha256(program)_sha256(options), with _sha256(weights) if they are baked in.

    `options` are everything else that affects the result (versions, target, flags), as JSON data in
    any order; raises TypeError for other data. `weights` are contiguous buffers, hashed as one
    string of bytes: their boundaries must follow from the program.
    """
    text = program.encode("utf-8") if isinstance(program, str) else program
    canonical = json.dumps(options, sort_keys=True, separators=(",", ":")).encode("ascii")
    digests = [hashlib.sha256(text).hexdigest(), hashlib.sha256(canonical).hexdigest()]
    if weights is not None:
        digest = hashlib.sha256()
        for buffer in [weights] if isinstance(weights, bytes) else weights:
            digest.update(buffer)
        digests.append(digest.hexdigest())
    return "_".join(digests)


def default_folder() -> Path:
    """Return ONELAUNCH_CACHE, or `onelaunch` in the cache folder of the system."""
    if path := os.environ.get("ONELAUNCH_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(path)))
    return _system_cache() / "onelaunch"


def _system_cache() -> Path:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        configured, default = os.environ.get("LOCALAPPDATA", ""), home / "AppData" / "Local"
    elif sys.platform == "darwin":
        configured, default = "", home / "Library" / "Caches"
    else:
        configured, default = os.environ.get("XDG_CACHE_HOME", ""), home / ".cache"
    # the XDG specification ignores relative paths
    if os.path.isabs(configured):
        return Path(configured)
    if default.is_absolute():
        return default
    # a user without a home folder, as in some containers
    return Path(tempfile.gettempdir()) / f"cache-{os.getuid() if hasattr(os, 'getuid') else 0}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A program in the cache."""

    key: str
    bytes: int
    """Size of its file."""
    last_used: float
    """Seconds since the epoch."""
    about: dict[str, str | float]


class Store:
    """A folder of compiled programs, with eviction of the least recently used above a size limit.

    The folder is created at the first write, accessible to its owner only. Several processes may
    use it at once. `hits`, `misses` and `damaged` count the results of `get`; `last_error` is the
    reason of the last failed read or write.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = default_folder() if folder is None else Path(os.path.abspath(folder))
        self.limit_bytes = limit_bytes
        self.hits = 0
        self.misses = 0
        self.damaged = 0
        self.last_error: str | None = None

    @property
    def unusable(self) -> str | None:
        """Why this folder is neither read nor written; None if it is usable."""
        try:
            status = os.stat(self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.folder}: {error.strerror or error}; {_USE_OTHER_FOLDER}"
        if not stat.S_ISDIR(status.st_mode):
            return f"{self.folder}: not a folder; {_USE_OTHER_FOLDER}"
        if _has_other_owner(status):
            return f"{self.folder}: belongs to another user, so it is not used; {_USE_OTHER_FOLDER}"
        if _is_writable_by_others(status):
            return (
                f"{self.folder}: others can write to it, so it is not used; "
                f"run chmod go-w on it, or {_USE_OTHER_FOLDER}"
            )
        return None

    def contains(self, key: str) -> bool:
        """Return whether a program with this key exists, by header and length; not counted."""
        if self.unusable is not None:
            return False
        try:
            with _open_own(self._path(key)) as file:
                return entry.read_header(file).key == key
        except (OSError, Damaged):
            return False

    def get(self, key: str) -> bytes | None:
        """Return the program after verification, or None; counts a hit or a miss.

        A damaged entry is removed, and also counted in `damaged`.
        """
        program = self.peek(key)
        if program is None:
            self.misses += 1
        else:
            self.hits += 1
        return program

    def peek(self, key: str) -> bytes | None:
        """As `get`, without counting a hit or a miss."""
        if self.unusable is not None:
            return None
        path = self._path(key)
        try:
            with _open_own(path) as file:
                _, program = entry.read(file, key)
        except FileNotFoundError:
            return None
        except Damaged:
            self.damaged += 1
            _remove(path)
            return None
        except OSError as error:
            self.last_error = f"{path}: cannot read: {error.strerror or error}"
            return None
        with suppress(OSError):
            _mark_used(path)
        return program

    def put(self, key: str, program: bytes, about: About = NOTHING) -> bool:
        """Store a program; returns False, with the reason in `last_error`, if that fails.

        Then the least recently used others are evicted until the size is within the limit, even if
        another process has loaded them: it has its own copy in memory.
        """
        self.last_error = self.unusable
        if self.last_error is not None:
            return False
        try:
            self.make_folder()
            path = self._path(key)
            self._write(path, key, program, about)
        except BadInput as error:
            self.last_error = str(error)
            return False
        except OSError as error:
            self.last_error = str(write_error(self.folder, error))
            return False
        self._evict(path)
        return True

    def make_folder(self) -> None:
        """Create the folder if it is missing. Raises OSError, and BadInput if it is `unusable`."""
        if self.unusable is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # another user may have created it meanwhile
        if (reason := self.unusable) is not None:
            raise BadInput(reason)

    def remove(self, key: str) -> bool:
        """Remove a program; returns whether there was one."""
        return self.unusable is None and _remove(self._path(key)) is not None

    def entries(self) -> list[Entry]:
        """List the entries, most recently used first."""
        entries = []
        for path, _ in self._files():
            try:
                with _open_own(path) as file:
                    header = entry.read_header(file)
                    status = os.fstat(file.fileno())
            except (OSError, Damaged):
                continue
            entries.append(Entry(header.key, status.st_size, status.st_mtime, header.about))
        return sorted(entries, key=lambda each: each.last_used, reverse=True)

    def clear(self) -> tuple[int, int]:
        """Remove every program, damaged ones too; returns their number and bytes."""
        sizes = [_remove(path) for path, _ in self._files()]
        self._remove_stale()
        removed = [size for size in sizes if size is not None]
        return len(removed), sum(removed)

    def _path(self, key: str) -> Path:
        # not the key itself: three digests are too long for the names of some file systems
        return self.folder / (hashlib.sha256(key.encode("utf-8")).hexdigest() + SUFFIX)

    def _write(self, path: Path, key: str, program: bytes, about: About) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
        try:
            with open(descriptor, "wb") as file:
                entry.write(file, key, program, about)
                file.flush()
                os.fsync(file.fileno())
            _mark_used(temporary)
            if path.is_dir():
                _remove(path)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _evict(self, newest: Path) -> None:
        self._remove_stale()
        files = sorted(self._files(), key=lambda each: each[1].st_mtime_ns)
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= self.limit_bytes:
                break
            if path != newest and (_remove(path) is not None or not path.exists()):
                total -= status.st_size

    def _remove_stale(self) -> None:
        oldest = time.time() - STALE_SECONDS
        for path, status in self._listing(".tmp"):
            if status.st_mtime < oldest and path.name.startswith("."):
                _remove(path)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        return self._listing(SUFFIX)

    def _listing(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield our files with this suffix; other files in the folder are ignored."""
        if self.unusable is not None:
            return
        try:
            names = os.listdir(self.folder)
        except OSError:
            return
        for name in names:
            if name.endswith(suffix):
                # another process may have removed it meanwhile
                with suppress(OSError):
                    path = self.folder / name
                    yield path, os.lstat(path)


_USE_OTHER_FOLDER = "set ONELAUNCH_CACHE to a folder of your own"


def _has_other_owner(status: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and status.st_uid != os.geteuid()


def _is_writable_by_others(status: os.stat_result) -> bool:
    # on Windows these bits have no meaning; access lists protect the folder of a user
    return os.name == "posix" and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _open_own(path: Path) -> BinaryIO:
    """Open a regular file that no other user could have written; raises Damaged, and OSError."""
    # checked first: opening a pipe would wait for its writer
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged("not a file")
    file = open(path, "rb")  # noqa: SIM115
    status = os.fstat(file.fileno())
    if _has_other_owner(status) or _is_writable_by_others(status):
        file.close()
        raise Damaged("writable by others")
    return file


def _mark_used(path: Path | str) -> None:
    # the clock of the file system is coarser: two uses could get the same time
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _remove(path: Path) -> int | None:
    """Remove a file, or a folder of that name; returns its bytes, or None if that failed."""
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError:
        return None
    return status.st_size
