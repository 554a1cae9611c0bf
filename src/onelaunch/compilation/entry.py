"""The file format of a cached program: a digest, a line of JSON metadata, the program.

    onelaunch program 1 <sha256 of all that follows, hex>
    {"key": ..., "bytes": <of the program>, "about": {...}}
    <the program>

The digest covers the JSON too, so every changed byte is detected. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

About = Mapping[str, str | float]
"""Metadata of a program for people: {"what": "the fast form", "seconds": 5.2}."""

_MAGIC = b"onelaunch program 1 "
_FIRST_LINE = len(_MAGIC) + 2 * hashlib.sha256().digest_size + 1


class Damaged(Exception):
    """The file is not a valid entry."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an entry."""

    key: str
    size: int
    """Bytes of the program alone."""
    about: dict[str, str | float]


def write(file: BinaryIO, key: str, program: bytes, about: About) -> None:
    """Write an entry. Raises OSError, and TypeError if `about` is not JSON data."""
    header = {"key": key, "bytes": len(program), "about": dict(about)}
    line = json.dumps(header).encode("ascii") + b"\n"
    digest = hashlib.sha256(line)
    digest.update(program)
    file.write(_MAGIC + digest.hexdigest().encode("ascii") + b"\n")
    file.write(line)
    file.write(program)


def read(file: BinaryIO, key: str) -> tuple[Header, bytes]:
    """Read an entry, from the start of `file`, and verify its digest and key.

    Raises Damaged, and OSError.
    """
    first, line, header = _head(file)
    if header.key != key:
        raise Damaged("the key of another program")
    program = file.read()
    digest = hashlib.sha256(line)
    digest.update(program)
    if first != _MAGIC + digest.hexdigest().encode("ascii") + b"\n":
        raise Damaged("the digest differs")
    return header, program


def read_header(file: BinaryIO) -> Header:
    """Read the header alone, and check the size of the file. Raises Damaged, and OSError."""
    return _head(file)[2]


def _head(file: BinaryIO) -> tuple[bytes, bytes, Header]:
    """Return the first line, the JSON line, and the parsed header."""
    first = file.read(_FIRST_LINE)
    line = file.readline()
    if len(first) < _FIRST_LINE or not first.startswith(_MAGIC):
        raise Damaged("not an entry")
    try:
        data = json.loads(line)
        header = Header(str(data["key"]), int(data["bytes"]), dict(data["about"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise Damaged("no header") from error
    if len(first) + len(line) + header.size != os.fstat(file.fileno()).st_size:
        raise Damaged("the length differs")
    return first, line, header
