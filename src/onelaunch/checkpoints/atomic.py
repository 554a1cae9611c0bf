"""Write files and folders atomically: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from onelaunch.checkpoints.lfs import refuse_pointer
from onelaunch.errors import BadInput, OnelaunchError, RunFailed

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.EACCES: "no permission to write here; choose another path",
    errno.EPERM: "no permission to write here; choose another path",
    errno.EFBIG: "the file would be larger than this system allows",
}


def write_error(path: Path | str, error: OSError) -> OnelaunchError:
    """Make the one-line error of a failed write: RunFailed if the disk is full, else BadInput."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (RunFailed if full else BadInput)(f"{path}: cannot write: {reason}")


def check_file_path(out: Path, example: str) -> None:
    """Raise BadInput where a file cannot have the name `out`: it is a folder (`example` is then a
    name in it), or its own folder does not exist."""
    if out.is_dir():
        raise BadInput(f"{out}: is a folder; pass a file name, such as {out / example}")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: the folder {out.parent} does not exist; create it first")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[IO[bytes]]:
    """Open a temporary binary file that replaces `path` when the block ends without an error.

    Raises RunFailed if the disk is full, BadInput if `path` cannot be written; `path` is then
    unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Make a temporary folder that is renamed to `path`, which must not exist, when the block ends
    without an error.

    Its files must be written and synced; `atomic_file` does both. Temporary folders of the same
    `path` that killed processes left behind are removed first.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = None
    try:
        _remove_abandoned(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        descriptor = _lock(temporary)
        yield temporary
        sync_directory(temporary)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder; returns the descriptor that holds the lock until it is closed or the process
    ends. None if another process holds it, or the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of `path` that no running process has locked."""
    own = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")
    with suppress(OSError):
        for folder in path.parent.iterdir():
            if own.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                descriptor = _lock(folder)
                if descriptor is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable, if the system can open folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Atomically replace a text file (UTF-8)."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path | str, data: Any) -> None:
    """Atomically replace a JSON file."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_bytes(path: Path | str, limit: int, kind: str) -> bytes:
    """Read a file of at most `limit` bytes. Raises BadInput naming the file if it cannot be read,
    is larger and so is not of this `kind`, or is a Git LFS pointer."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    if len(data) > limit:
        raise BadInput(f"{path}: larger than {limit} bytes; this is not {kind}")
    refuse_pointer(path, data)
    return data


def read_json(path: Path | str, limit: int = 64 << 20) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes; a byte order mark is skipped.

    Raises BadInput naming the file.
    """
    raw = read_bytes(path, limit, "a configuration file")
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise BadInput(f"{path}: not valid JSON (nested too deep)") from error
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: must hold a JSON object")
    return data


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
