"""Git LFS pointers: what lies in a clone's place of a large file until Git LFS has fetched it."""

from __future__ import annotations

from pathlib import Path

from onelaunch.errors import BadInput

# Shorter than the smallest header that is read here.
_POINTER = b"version https://git-lfs."


def refuse_pointer(path: Path | str, data: bytes) -> None:
    """Raise BadInput where `data`, a file's beginning, is that of a Git LFS pointer."""
    if data.startswith(_POINTER):
        raise BadInput(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "folder, or download the file again"
        )


def refuse_pointer_at(path: Path | str) -> None:
    """The same for a file that another library is to open; what cannot be read is left to it."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(len(_POINTER))
    except OSError:
        return
    refuse_pointer(path, beginning)
