"""Child processes with a line-based protocol, which end with their parent."""

from __future__ import annotations

import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from onelaunch.compilation.background import exit_reason, printable
from onelaunch.compilation.environment import child_environment

ENDING_SECONDS = 5.0
EXIT_SECONDS = 60.0
"""From the end of a child's output to its exit: seconds with torch on a busy machine."""
STDERR_BYTES = READ_BYTES = 1 << 16


class Child:
    """A child process that leads its own process group, so that its children are killed with it.

    A killed child leaves its temporary files; they are in `scratch`, if that is set."""

    def __init__(self, command: Sequence[str], scratch: Path | None = None) -> None:
        self._received = bytearray()
        # a file, as a full pipe that is not read would block the child
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=child_environment(**({} if scratch is None else {"TMPDIR": str(scratch)})),
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, line: str) -> bool:
        """Write a line to the child; returns False if it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: `end` has closed the pipe
            return False
        return True

    def receive(self) -> str:
        """Read the next line of the child; empty if it has ended."""
        assert self._process.stdout is not None
        try:
            return self._process.stdout.readline().decode("ascii", "replace").strip()
        except (OSError, ValueError):
            return ""

    def receive_within(self, seconds: float) -> str:
        """As `receive`, which must not be mixed with it. Raises TimeoutError."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                # unbuffered: a buffered read would block on an incomplete line
                if not (more := os.read(self._process.stdout.fileno(), READ_BYTES)):
                    return ""
                self._received += more
        line, _, rest = self._received.partition(b"\n")
        self._received = bytearray(rest)
        return line.decode("ascii", "replace").strip()

    def reason(self) -> str:
        """Return why it has ended: its signal, or its last line on standard error."""
        try:
            return exit_reason(self._process.wait(EXIT_SECONDS), self._errors)
        except (subprocess.TimeoutExpired, ValueError):
            return "it does not exit"

    def stderr_lines(self) -> list[str]:
        """Return the last lines on its standard error, running or not."""
        try:
            n_bytes = os.fstat(self._errors.fileno()).st_size
            # pread, as the child shares the file position and a seek would move it
            tail = os.pread(self._errors.fileno(), STDERR_BYTES, max(0, n_bytes - STDERR_BYTES))
        except (OSError, ValueError):  # ValueError: `end` has closed the file
            return []
        return [
            text
            for line in tail.decode("utf-8", "replace").split("\n")
            if (text := printable(line))
        ]

    def end(self) -> None:
        """Kill it, with its own children."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return  # blocked in a driver; closing a pipe that is being read would block too
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()  # type: ignore[union-attr]


def parent_lines() -> queue.SimpleQueue[str]:
    """In a child: a queue of the lines that the parent sends. At their end the parent is gone, and
    the child kills itself and its own children."""
    lines = queue.SimpleQueue[str]()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    return lines


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in iter(sys.stdin.readline, ""):
        lines.put(line)
    with suppress(ProcessLookupError, PermissionError):  # if it leads no process group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
