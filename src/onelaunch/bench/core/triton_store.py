"""Triton's store of compiled kernels: counted, copied, damaged."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onelaunch.compilation.environment import child_environment
from onelaunch.operators.triton_cache import DIGEST

BINARIES = (".cubin", ".hsaco")
GROUP = "__grp__"
"""How the file begins that is written last, with the paths of a kernel's other files."""


class Counts:
    """Counts of what Triton did for kernels that a process did not have yet: compiled or read
    them."""

    def __init__(self) -> None:
        self.compilations = 0
        self.hits = 0

    def __call__(self, *, cache_hit: bool, **about: Any) -> None:
        self.hits += cache_hit
        self.compilations += not cache_hit


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts of what happens meanwhile in this process."""
    from triton import knobs

    before, counts = knobs.compilation.listener, Counts()
    knobs.compilation.listener = counts
    try:
        yield counts
    finally:
        knobs.compilation.listener = before


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps Triton's kernels, and this package's choices, under a
    folder."""
    stores = {"TRITON_CACHE_DIR": folder / "triton", "ONELAUNCH_CACHE": folder / "choices"}
    return child_environment(**{name: str(path) for name, path in stores.items()})


def binaries(folder: Path) -> list[Path]:
    """The binaries of the kernels kept under a folder, the largest first."""
    return _by_size(path for path in folder.rglob("*") if path.suffix in BINARIES)


def launchers(folder: Path) -> list[Path]:
    """Libraries that launch kernels, the largest first."""
    return _by_size(path for path in folder.rglob("*launcher*") if path.suffix == ".so")


def _by_size(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (-path.stat().st_size, path))


def entries(folder: Path) -> int:
    """The number of kernels that are kept complete under a folder."""
    return sum(path.with_name(path.name.removeprefix(GROUP)).is_file() for path in _groups(folder))


def copied(folder: Path, to: Path) -> Path:
    """A copy that is read in its own place: Triton keeps the paths of its files as a whole."""
    shutil.copytree(folder, to)
    for path in _groups(to):
        content = path.read_text().replace(str(folder), str(to))
        path.write_text(content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        path.with_name(path.name + DIGEST).write_text(digest)
    return to


def _groups(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(f"{GROUP}*") if path.suffix != DIGEST]


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
