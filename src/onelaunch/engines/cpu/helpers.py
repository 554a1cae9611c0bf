"""Threads in addition to the caller's: they live in the compiled program while there is work, and
sleep otherwise."""

from __future__ import annotations

import os
import threading

from onelaunch.engines.cpu.layout import Operation
from onelaunch.engines.cpu.program import Program

IDLE_MICROSECONDS = 20_000


class Helpers:
    """Up to `count` helper threads, started at the first `wake`.

    `keep` is what a thread may still look at while its engine is let go.
    """

    def __init__(self, program: Program, state: int, count: int, keep: object) -> None:
        self._program, self._state, self._count = program, state, count
        self._keep = keep
        self._condition = threading.Condition()
        self._calls = 0  # wakes so far: a helper that has seen fewer has something to look at
        self._asleep = 0
        self._closing = False
        self._pid = 0

    def wake(self) -> None:
        """Before a call: helpers that sleep come back."""
        if not self._count:
            return
        if self._pid != os.getpid():  # at first, and in a forked child, where none are left
            self._pid = os.getpid()
            self._condition = threading.Condition()
            self._asleep = 0
            for number in range(1, self._count + 1):
                threading.Thread(
                    target=self._live, args=(number,), name=f"onelaunch {number}", daemon=True
                ).start()
        self._calls += 1
        if self._asleep:
            with self._condition:
                self._condition.notify_all()

    def close(self) -> None:
        """Send them home; the program's own word for it must be set already."""
        self._closing = True
        with self._condition:
            self._condition.notify_all()

    def _live(self, number: int) -> None:
        while not self._closing:
            seen = self._calls
            self._program.call(Operation.HELP, self._state, number, IDLE_MICROSECONDS)
            with self._condition:
                self._asleep += 1
                while self._calls == seen and not self._closing:
                    self._condition.wait()
                self._asleep -= 1
