"""Command lines of children that compile or fail, and helpers for stores."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from onelaunch.compilation.cache import Store

DELIVER = "from onelaunch.compilation.child import deliver"
HANG = "time.sleep(600)"


def child(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time\n{code}", *arguments]


def compiler(program: bytes = b"program", first: str = "pass") -> list[str]:
    """A child that runs `first`, then delivers."""
    return child(f"{DELIVER}\n{first}\ndeliver(sys.argv[-1], {program!r})")


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def the_file(store: Store) -> Path:
    (path,) = (path for path in store.folder.iterdir() if not path.name.startswith("."))
    return path


def counts(store: Store) -> tuple[int, int, int]:
    return store.hits, store.misses, store.damaged
