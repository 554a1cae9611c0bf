"""Detect Git LFS pointers: small text files in place of large ones that are not fetched yet."""

from __future__ import annotations

from pathlib import Path

from onelaunch.errors import BadInput

# Shorter than the smallest header of any format.
_POINTER = b"version https://git-lfs."


def refuse_pointer(path: Path | str, data: bytes) -> None:
    """Raise BadInput if `data`, the beginning of a file, is that of a Git LFS pointer."""
    if data.startswith(_POINTER):
        raise BadInput(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
            "or download the file again"
        )


def refuse_pointer_at(path: Path | str) -> None:
    """As `refuse_pointer`, for a file on disk; ignores files that cannot be read."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(len(_POINTER))
    except OSError:
        return
    refuse_pointer(path, beginning)
