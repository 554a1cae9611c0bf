"""Processes that are told lines and answer with lines, and end with their parent."""

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

from onelaunch.compilation.background import plain, why_ended
from onelaunch.compilation.environment import child_environment

ENDING_SECONDS = 5.0
LAST_WORDS_SECONDS = 60.0
"""From the end of a child's output to its exit: seconds on a busy machine where it has torch."""
SAID_BYTES = READ_BYTES = 1 << 16


class Child:
    """One of them, leading a group of its own, so that what it has called ends with it. A child
    that is killed leaves its temporary files: they lie in `scratch`, if that is given."""

    def __init__(self, command: Sequence[str], scratch: Path | None = None) -> None:
        self.ended_by_us = False
        self._heard = bytearray()
        # a file: a pipe that nobody reads holds the child up when it is full
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

    def tell(self, line: str) -> bool:
        """Whether it could be told."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: `end` has closed the pipe
            return False
        return True

    def hear(self) -> str:
        """Its next line; empty where it has ended."""
        assert self._process.stdout is not None
        try:
            return self._process.stdout.readline().decode("ascii", "replace").strip()
        except (OSError, ValueError):
            return ""

    def hear_within(self, seconds: float) -> str:
        """As `hear`, which must not have been called. Raises TimeoutError."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                # past the buffer, where a line that is cut off would be waited for without end
                if not (more := os.read(self._process.stdout.fileno(), READ_BYTES)):
                    return ""
                self._heard += more
        line, _, rest = self._heard.partition(b"\n")
        self._heard = bytearray(rest)
        return line.decode("ascii", "replace").strip()

    def reason(self) -> str:
        """Why it has ended: its signal, or the last line of what it wrote on standard error."""
        try:
            return why_ended(self._process.wait(LAST_WORDS_SECONDS), self._errors)
        except (subprocess.TimeoutExpired, ValueError):
            return "it says nothing more"

    def said(self) -> list[str]:
        """The last lines that it has written on standard error, living or not."""
        try:
            n_bytes = os.fstat(self._errors.fileno()).st_size
            # pread: the place in the file is the child's too, and a seek would move it
            tail = os.pread(self._errors.fileno(), SAID_BYTES, max(0, n_bytes - SAID_BYTES))
        except (OSError, ValueError):  # ValueError: `end` has closed the file
            return []
        return [
            text for line in tail.decode("utf-8", "replace").split("\n") if (text := plain(line))
        ]

    def end(self) -> None:
        """Kill it, with all that it has called."""
        self.ended_by_us = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return  # a driver holds it; to close a pipe that is being read would wait for it too
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                file.close()  # type: ignore[union-attr]


def lines_of_parent() -> queue.SimpleQueue[str]:
    """In a child: the lines that it is told. Where they end, nobody wants its answer: it is killed
    then, whatever it is at, with all that it has called."""
    lines = queue.SimpleQueue[str]()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    return lines


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in iter(sys.stdin.readline, ""):
        lines.put(line)
    with suppress(ProcessLookupError, PermissionError):  # where it leads no group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
