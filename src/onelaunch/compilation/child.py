"""The child process side of a compilation: lower its priority, and deliver the program.

The main of such a module:

    lower_priority()
    program = compile(sys.argv[1:-1])
    deliver(sys.argv[-1], program)

A failure is a nonzero exit status, with the reason as the last line on standard error.
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
NOT_CACHED = "not kept"
"""Key in `about` of a program that could not be stored: the reason."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a child delivers its program; as text, the last argument of its command line."""

    folder: str
    limit_bytes: int
    key: str
    name: str
    started: float
    """Seconds since the epoch."""

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Parse a destination; raises BadInput if `text` is not one."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{text[:80]!r}: not a destination of a compiled program") from error


def deliver(destination: str, program: bytes, about: About = NOTHING) -> None:
    """Store a program as the last argument says, or else pass it to the waiting parent.

    The store comes first, so that the program is kept even if the parent has ended. If it cannot be
    stored, it is written to standard output, which is a file that the parent reads. `about` gets
    "what" and "seconds" unless it has them. Raises RunFailed if both fail.
    """
    target = Destination.parse(destination)
    seconds = max(0.0, round(time.time() - target.started, 3))
    metadata: dict[str, str | float] = {"what": target.name, "seconds": seconds, **about}
    store = Store(Path(target.folder), target.limit_bytes)
    if store.put(target.key, program, metadata):
        return
    reason = store.last_error or "unknown"
    try:
        sys.stdout.flush()
        # drops output of the compiler; fails on a terminal or a pipe
        os.ftruncate(sys.stdout.fileno(), 0)
        os.lseek(sys.stdout.fileno(), 0, os.SEEK_SET)
        entry.write(sys.stdout.buffer, target.key, program, {**metadata, NOT_CACHED: reason})
        sys.stdout.flush()
    except (OSError, AttributeError) as error:
        raise RunFailed(f"the program could not be delivered: {reason}") from error


def usable_cores() -> int:
    """Return the number of cores that this process may use, which a container can limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lower_priority() -> None:
    """Lower the priority of this process, if the system supports it."""
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    # Linux with autogroups schedules whole sessions against each other: without this `nice` has no
    # effect for a child in its own session.
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")
