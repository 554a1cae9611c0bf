"""What a compiling child process does besides compiling: step back, and bring its program home.

The whole main of such a module:

    lower_priority()
    program = compile(sys.argv[1:-1])
    deliver(sys.argv[-1], program)

and for a failure, a reason as the last line on standard error and an exit status other than 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from onelaunch.compilation import entry
from onelaunch.compilation.cache import NOTHING, Store
from onelaunch.compilation.entry import About
from onelaunch.errors import BadInput, RunFailed

NICENESS = 5
NOT_KEPT = "not kept"
"""In `about` of a program that came past the store: why."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a child brings its program: the last argument of its command line, as text."""

    folder: str
    limit_bytes: int
    key: str
    what: str
    started: float
    """Seconds since the epoch."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Raises BadInput where `text` is not a destination."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{text[:80]!r}: not a place for a compiled program") from error


def deliver(destination: str, program: bytes, about: About = NOTHING) -> None:
    """Bring a program to where the last argument says: the store, or else the waiting parent.

    The store comes first: what a child has made is kept even where its parent has ended since.
    Where nothing can be kept, the program goes to standard output, which is then a file that the
    parent reads. `about` gains "what" and "seconds" where it lacks them. Raises RunFailed where
    neither way is open.
    """
    to = Destination.parse(destination)
    seconds = max(0.0, round(time.time() - to.started, 3))
    facts: dict[str, str | float] = {"what": to.what, "seconds": seconds, **about}
    store = Store(Path(to.folder), to.limit_bytes)
    if store.put(to.key, program, facts):
        return
    why = store.last_error or "unknown"
    try:
        sys.stdout.flush()
        # what a compiler may have printed goes; a terminal or a pipe cannot do this
        os.ftruncate(sys.stdout.fileno(), 0)
        os.lseek(sys.stdout.fileno(), 0, os.SEEK_SET)
        entry.write(sys.stdout.buffer, to.key, program, {**facts, NOT_KEPT: why})
        sys.stdout.flush()
    except (OSError, AttributeError) as error:
        raise RunFailed(f"the program could not be handed over: {why}") from error


def usable_cores() -> int:
    """Cores that this process may use, which a container can narrow."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lower_priority() -> None:
    """Let everything else that runs here go first, where the system knows how."""
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    # Linux with autogroups weighs whole sessions against each other, and a process only within
    # its own: without this the line above does nothing for a child in a session of its own.
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")
