"""One compiled program as a file: a digest, a line of JSON that says what it is, the program.

    onelaunch program 1 <sha256 of all that follows, hex>
    {"key": ..., "bytes": <of the program>, "about": {...}}
    <the program>

The digest covers the JSON too: no byte can change unseen. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

About = Mapping[str, str | float]
"""What a program is and what it cost, for people: {"what": "the fast form", "seconds": 5.2}."""

_MAGIC = b"onelaunch program 1 "
_FIRST_LINE = len(_MAGIC) + 2 * hashlib.sha256().digest_size + 1


class Damaged(Exception):
    """The file is not the entry that it should be."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an entry says of itself."""

    key: str
    size: int
    """Bytes of the program alone."""
    about: dict[str, str | float]


def write(file: BinaryIO, key: str, program: bytes, about: About) -> None:
    """Write an entry. Raises OSError, and TypeError where `about` is not plain data."""
    header = {"key": key, "bytes": len(program), "about": dict(about)}
    line = json.dumps(header).encode("ascii") + b"\n"
    digest = hashlib.sha256(line)
    digest.update(program)
    file.write(_MAGIC + digest.hexdigest().encode("ascii") + b"\n")
    file.write(line)
    file.write(program)


def read(file: BinaryIO, key: str) -> tuple[Header, bytes]:
    """The header and the program of an entry whose every byte is as it was written under `key`.

    `file` stands at its start. Raises Damaged, and OSError.
    """
    first, line, header = _head(file)
    if header.key != key:
        raise Damaged("the entry of another program")
    program = file.read()
    digest = hashlib.sha256(line)
    digest.update(program)
    if first != _MAGIC + digest.hexdigest().encode("ascii") + b"\n":
        raise Damaged("not what was written")
    return header, program


def read_header(file: BinaryIO) -> Header:
    """The header alone, its size held against the file's. Raises Damaged, and OSError."""
    return _head(file)[2]


def _head(file: BinaryIO) -> tuple[bytes, bytes, Header]:
    """The first line, the JSON line, and what that says."""
    first = file.read(_FIRST_LINE)
    line = file.readline()
    if len(first) < _FIRST_LINE or not first.startswith(_MAGIC):
        raise Damaged("no entry")
    try:
        found = json.loads(line)
        header = Header(str(found["key"]), int(found["bytes"]), dict(found["about"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise Damaged("no header") from error
    if len(first) + len(line) + header.size != os.fstat(file.fileno()).st_size:
        raise Damaged("not as long as it was")
    return first, line, header
