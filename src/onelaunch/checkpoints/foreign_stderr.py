"""Calls into Rust and C++ libraries whose errors must not reach the terminal on their own.

A Rust panic prints "thread '<unnamed>' panicked at ..." and sentencepiece its log to file
descriptor 2, past sys.stderr, before Python gets an exception.
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
    """Run `call` with file descriptor 2 turned aside.

    What was written meanwhile, perhaps by another thread, is passed on when the call returns, and
    dropped when it raises.
    """
    with _lock:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            kept = os.dup(_STDERR)
        except OSError:  # it is closed
            return call()
        aside = _aside()
        returned = False
        try:
            os.dup2(aside.fileno(), _STDERR)
            result = call()
            returned = True
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            written = _taken_from(aside)
        if returned and written:
            with suppress(OSError):
                os.write(_STDERR, written)
        return result


@cache
def _aside() -> BinaryIO:
    try:
        return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
    except OSError:  # no place for one: nothing is passed on then
        return open(os.devnull, "r+b", buffering=0)


def _taken_from(aside: BinaryIO) -> bytes:
    with suppress(OSError):
        if os.lseek(aside.fileno(), 0, os.SEEK_CUR):
            aside.seek(0)
            written = aside.read()
            aside.seek(0)
            aside.truncate()
            return written
    return b""
