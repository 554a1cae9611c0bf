"""Keep the error output of Rust and C++ libraries off the terminal.

A Rust panic prints "thread '<unnamed>' panicked at ...", and sentencepiece its log, to file
descriptor 2, which bypasses sys.stderr, before Python gets an exception.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import BinaryIO, TypeVar, cast

_T = TypeVar("_T")

_STDERR = 2
_lock = threading.RLock()


def without_stderr(call: Callable[[], _T]) -> _T:
    """Run `call` with file descriptor 2 redirected to a temporary file.

    Output written meanwhile, perhaps by another thread, is printed when the call returns, and
    dropped when it raises.
    """
    with _lock:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            saved = os.dup(_STDERR)
        except OSError:  # stderr is closed
            return call()
        capture = _capture_file()
        returned = False
        try:
            os.dup2(capture.fileno(), _STDERR)
            result = call()
            returned = True
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)
            written = _drain(capture)
        if returned and written:
            with suppress(OSError):
                os.write(_STDERR, written)
        return result


@cache
def _capture_file() -> BinaryIO:
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
    except OSError:  # no temporary folder: the output is lost
        return open(os.devnull, "r+b", buffering=0)


def _drain(capture: BinaryIO) -> bytes:
    with suppress(OSError):
        if os.lseek(capture.fileno(), 0, os.SEEK_CUR):
            capture.seek(0)
            written = capture.read()
            capture.seek(0)
            capture.truncate()
            return written
    return b""
