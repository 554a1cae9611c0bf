"""Triton's store of compiled kernels: counted, copied, damaged."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = (".cubin", ".hsaco")
GROUP = "__grp__"
"""How the file begins that is written last, with the paths of a kernel's other files."""
INSTRUCTION_BYTES, DESTINATION = 16, 2
"""Of NVIDIA's instructions since Volta: their size, and which byte names the register written."""


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


def change(path: Path) -> None:
    """Change a bit in the middle of a kernel's code: of which register an instruction writes, where
    it writes one."""
    content = bytearray(path.read_bytes())
    start, size = code_of(content)
    middle = size // 2 // INSTRUCTION_BYTES * INSTRUCTION_BYTES
    content[start + middle + DESTINATION] ^= 1
    path.write_bytes(content)


def code_of(binary: bytes | bytearray) -> tuple[int, int]:
    """Where the code begins in an ELF file of 64 bits, and its bytes: the largest section whose
    name begins with .text."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count, names = struct.unpack_from("<3H", binary, 0x3A)
    sections = [struct.unpack_from("<2I4Q", binary, table + size * i) for i in range(count)]
    text = sections[names][4]  # where names lie
    found = [
        (extent, offset)
        for name, _, _, _, offset, extent in sections
        if binary.startswith(b".text", text + name)
    ]
    extent, offset = max(found)
    return offset, extent
