"""Triton's store of compiled kernels: counted, copied, damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = (".cubin", ".hsaco")
GROUP = "__grp__"
"""How the file begins that is written last, with the paths of a kernel's other files."""


class Counts:
    """What Triton did for kernels that a process did not have yet: compiled or read them."""

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
    """Of a process that keeps Triton's kernels, and this package's choices, under a folder."""
    stores = {"TRITON_CACHE_DIR": folder / "triton", "ONELAUNCH_CACHE": folder / "choices"}
    return os.environ | {name: str(path) for name, path in stores.items()}


def binaries(folder: Path) -> list[Path]:
    """Of the kernels kept under a folder, the largest first."""
    found = [path for path in folder.rglob("*") if path.suffix in BINARIES]
    return sorted(found, key=lambda path: (-path.stat().st_size, path))


def entries(folder: Path) -> int:
    """How many kernels are kept under a folder to the last of their files."""
    return sum(path.with_name(path.name.removeprefix(GROUP)).is_file()
               for path in folder.rglob(f"{GROUP}*"))  # fmt: skip


def copied(folder: Path, to: Path) -> Path:
    """A copy that is read in its own place: Triton keeps the paths of its files as a whole."""
    shutil.copytree(folder, to)
    for path in to.rglob(f"{GROUP}*"):
        path.write_text(path.read_text().replace(str(folder), str(to)))
    return to


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
