"""Choices found in the background, one after another, while a form that is there answers."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from onelaunch.compilation.background import in_a_line, tell

T = TypeVar("T")

Find = Callable[[Callable[[], bool]], T]
"""Finds one; asks what it is given, now and then, whether to stop."""
LEAVING_SECONDS = 5.0

_alive: weakref.WeakSet[Chooser[Any]] = weakref.WeakSet()


class Chooser(Generic[T]):
    """A thread, where there is something to find, and what it has found. `say` is called from it
    where finding fails."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._changed = threading.Condition()
        self._asked: set[str] = set()
        self._waiting: list[tuple[str, Find[T]]] = []
        self._found: dict[str, T] = {}
        self.cancelled = threading.Event()
        """Set it to stop as soon as may be: what has not been found then will not be."""
        self._thread: threading.Thread | None = None
        self.failed: dict[str, str] = {}
        """Why there is none, in a line."""
        _alive.add(self)

    def ask(self, name: str, find: Find[T]) -> None:
        """Have something found, once."""
        with self._changed:
            if name in self._asked or self.cancelled.is_set():
                return
            self._asked.add(name)
            self._waiting.append((name, find))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="choosing", daemon=True)
                self._thread.start()

    def take(self) -> dict[str, T]:
        """What was found since the last time."""
        with self._changed:
            found, self._found = self._found, {}
        return found

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all has been found or has failed; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or self.cancelled.is_set():
                    self._thread = None
                    self._changed.notify_all()
                    return
                name, find = self._waiting.pop(0)
            try:
                found = find(self.cancelled.is_set)
                with self._changed:
                    self._found[name] = found
            except BaseException as error:  # a thread has nobody to raise to
                if not self.cancelled.is_set():
                    self.failed[name] = in_a_line(error)
                    tell(self._say, f"{name}: nothing chosen ({self.failed[name]})")


def _stop_all() -> None:
    """A thread that is at work on a device when the interpreter ends can crash it."""
    choosers = list(_alive)
    for chooser in choosers:
        chooser.cancelled.set()
    for chooser in choosers:
        chooser.wait(LEAVING_SECONDS)


atexit.register(_stop_all)
