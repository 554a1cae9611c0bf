"""The store of compiled programs on disk, addressed by what they were compiled from.

Programs are machine code: a folder or a file that somebody else could have written is never read.
A store that cannot be used answers as an empty one and says why; nothing depends on it but time.
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
"""Age at which a temporary file has lost its writer."""
NOTHING: About = MappingProxyType({})


def program_key(
    program: str | bytes,
    options: Mapping[str, object],
    weights: bytes | Iterable[bytes | bytearray | memoryview] | None = None,
) -> str:
    """sha256(program)_sha256(options), and _sha256(weights) where they are baked in; hex.

    `options` are whatever else decides the result (versions, target, flags), as plain JSON data in
    any order; TypeError where they are not. `weights` are contiguous buffers, hashed as one text:
    where one ends is for the program to say.
    """
    text = program.encode("utf-8") if isinstance(program, str) else program
    canonical = json.dumps(options, sort_keys=True, separators=(",", ":")).encode("ascii")
    parts = [hashlib.sha256(text).hexdigest(), hashlib.sha256(canonical).hexdigest()]
    if weights is not None:
        digest = hashlib.sha256()
        for buffer in [weights] if isinstance(weights, bytes) else weights:
            digest.update(buffer)
        parts.append(digest.hexdigest())
    return "_".join(parts)


def default_folder() -> Path:
    """ONELAUNCH_CACHE, or `onelaunch` in the folder that this system has for caches."""
    if named := os.environ.get("ONELAUNCH_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    return _system_cache() / "onelaunch"


def _system_cache() -> Path:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        named, usual = os.environ.get("LOCALAPPDATA", ""), home / "AppData" / "Local"
    elif sys.platform == "darwin":
        named, usual = "", home / "Library" / "Caches"
    else:
        named, usual = os.environ.get("XDG_CACHE_HOME", ""), home / ".cache"
    # the XDG specification: a relative path is to be ignored
    if os.path.isabs(named):
        return Path(named)
    if usual.is_absolute():
        return usual
    # a user without a home, as in some containers
    return Path(tempfile.gettempdir()) / f"cache-{os.getuid() if hasattr(os, 'getuid') else 0}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One program in the store."""

    key: str
    bytes: int
    """Of its file."""
    last_used: float
    """Seconds since the epoch."""
    about: dict[str, str | float]


class Store:
    """Compiled programs in a folder, the least recently used going first where they grow too many.

    The folder is made at the first write, for its owner alone. Several processes may use it at
    once. `hits`, `misses` and `damaged` count what `get` found; `last_error` says why the last
    read or write that failed did so.
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
        """Why nothing is read from this folder or written to it; None where all is well."""
        try:
            found = os.stat(self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.folder}: {error.strerror or error}; {_ELSEWHERE}"
        if not stat.S_ISDIR(found.st_mode):
            return f"{self.folder}: not a folder; {_ELSEWHERE}"
        if _foreign(found):
            return f"{self.folder}: belongs to another user, so it is not trusted; {_ELSEWHERE}"
        if _open_to_others(found):
            return (
                f"{self.folder}: others can write to it, so it is not trusted; "
                f"run chmod go-w on it, or {_ELSEWHERE}"
            )
        return None

    def contains(self, key: str) -> bool:
        """Whether there is a program of this key, judged by its header and length; not counted."""
        if self.unusable is not None:
            return False
        try:
            with _open_own(self._path(key)) as file:
                return entry.read_header(file).key == key
        except (OSError, Damaged):
            return False

    def get(self, key: str) -> bytes | None:
        """The program, every byte verified, or None; counts a hit or a miss.

        An entry that is not what was written is removed and counted in `damaged` as well.
        """
        program = self.peek(key)
        if program is None:
            self.misses += 1
        else:
            self.hits += 1
        return program

    def peek(self, key: str) -> bytes | None:
        """`get` that counts neither a hit nor a miss."""
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
        """Keep a program; False where that cannot be, and `last_error` says why.

        Then the least recently used others go until all are within the limit. One in use by
        another process may go too: it is in that process's memory.
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
        self._make_room(path)
        return True

    def make_folder(self) -> None:
        """Make the folder where it is missing. Raises OSError, and BadInput where it is there and
        not to be trusted."""
        if self.unusable is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # somebody else may have been faster
        if (reason := self.unusable) is not None:
            raise BadInput(reason)

    def remove(self, key: str) -> bool:
        """Forget a program; whether it was there."""
        return self.unusable is None and _remove(self._path(key)) is not None

    def entries(self) -> list[Entry]:
        """What is in the store, the last used first."""
        found = []
        for path, _ in self._files():
            try:
                with _open_own(path) as file:
                    header = entry.read_header(file)
                    facts = os.fstat(file.fileno())
            except (OSError, Damaged):
                continue
            found.append(Entry(header.key, facts.st_size, facts.st_mtime, header.about))
        return sorted(found, key=lambda each: each.last_used, reverse=True)

    def clear(self) -> tuple[int, int]:
        """Remove every program, damaged ones too; returns how many went, and their bytes."""
        sizes = [_remove(path) for path, _ in self._files()]
        self._remove_stale()
        gone = [size for size in sizes if size is not None]
        return len(gone), sum(gone)

    def _path(self, key: str) -> Path:
        # not the key itself: three digests are longer than some file systems' names may be
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

    def _make_room(self, newest: Path) -> None:
        self._remove_stale()
        files = sorted(self._files(), key=lambda each: each[1].st_mtime_ns)
        total = sum(found.st_size for _, found in files)
        for path, found in files:
            if total <= self.limit_bytes:
                break
            if path != newest and (_remove(path) is not None or not path.exists()):
                total -= found.st_size

    def _remove_stale(self) -> None:
        oldest = time.time() - STALE_SECONDS
        for path, found in self._listing(".tmp"):
            if found.st_mtime < oldest and path.name.startswith("."):
                _remove(path)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        return self._listing(SUFFIX)

    def _listing(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of ours by the end of their name; whatever else lies here is left alone."""
        if self.unusable is not None:
            return
        try:
            names = os.listdir(self.folder)
        except OSError:
            return
        for name in names:
            if name.endswith(suffix):
                # another process may have removed it since
                with suppress(OSError):
                    path = self.folder / name
                    yield path, os.lstat(path)


_ELSEWHERE = "set ONELAUNCH_CACHE to a folder of your own"


def _foreign(found: os.stat_result) -> bool:
    return hasattr(os, "geteuid") and found.st_uid != os.geteuid()


def _open_to_others(found: os.stat_result) -> bool:
    # Windows makes up these bits; there the user's own folder is protected by its own list
    return os.name == "posix" and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _open_own(path: Path) -> BinaryIO:
    """Open a plain file that nobody else could have written; raises Damaged, and OSError."""
    # asked first: opening a pipe would wait for its writer
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise Damaged("not a file")
    file = open(path, "rb")  # noqa: SIM115
    found = os.fstat(file.fileno())
    if _foreign(found) or _open_to_others(found):
        file.close()
        raise Damaged("open to others")
    return file


def _mark_used(path: Path | str) -> None:
    # the system's own "now" is coarser: two uses could look like one
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _remove(path: Path) -> int | None:
    """Remove a file, or a folder in its place; its bytes, or None where this call removed none."""
    try:
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except OSError:
        return None
    return found.st_size
