"""Recognize binary files that contain text: compressed files, archives and tables."""

from __future__ import annotations

import shlex
from pathlib import Path

from onelaunch.errors import BadInput

_TABLE = "write its text to a .txt file first, for example with pandas"

# (offset, magic number long enough that no text has it, description, remedy).
_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it first: gunzip -k {path}"),
    (4, b"1AY&SY", "compressed by bzip2", "unpack it first: bunzip2 -k {path}"),
    (0, b"\xfd7zXZ\x00", "compressed by xz", "unpack it first: unxz -k {path}"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unpack it first: unzstd {path}"),
    (1, b"\x2a\x4d\x18", "compressed by Zstandard", "unpack it first: unzstd {path}"),
    (0, b"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it first: unlz4 {path}"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it first: unzip {path}"),
    (0, b"PK\x05\x06", "an empty zip archive", "name another file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x {path}"),
    (257, b"ustar\x00", "a tar archive", "unpack it first: tar -xf {path}"),
    (257, b"ustar  \x00", "a tar archive", "unpack it first: tar -xf {path}"),
    (0, b"PAR1\x15", "a Parquet table", _TABLE),
    (0, b"ARROW1\x00\x00", "an Arrow table", _TABLE),
    (0, b"SQLite format 3\x00", "an SQLite database", _TABLE),
    (0, b"%PDF-", "a PDF document", "convert it first: pdftotext {path}"),
)
_LONGEST = max(start + len(magic) for start, magic, *_ in _KINDS)


def refuse_binary(path: Path) -> None:
    """Raise BadInput, naming the format and the remedy, for a file with one of these magic numbers;
    its name does not matter."""
    try:
        with open(path, "rb") as file:
            head = file.read(_LONGEST)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    quoted = shlex.quote(str(path))
    for start, magic, kind, remedy in _KINDS:
        if head[start : start + len(magic)] == magic:
            raise BadInput(f"{path}: is {kind}, not text; {remedy.format(path=quoted)}")
