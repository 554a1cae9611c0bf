"""A session in which PyTorch generates while the kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request
from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent

TIMEOUT = 0.4
"""Seconds that a request waits for kernels, so that those of the store have time to be loaded."""


class Meanwhile:
    """A `Session` of requests that are written by `session`, or to their end by one of `other`:
    where `compiling` says that the kernels of one are not there after `timeout` seconds, it and
    whatever comes until `other` has none left.

    `compiling` starts to compile what a request needs, and returns a future that is done when it
    is there; an error of it is left to `session`.
    """

    def __init__(
        self,
        config: ModelConfig,
        session: Session,
        other: Callable[[], Session],
        compiling: Callable[[Request], Future[None]],
        log: Callable[[str], None],
        timeout: float = TIMEOUT,
    ) -> None:
        self._config, self._session, self._make_other = config, session, other
        self._compiling, self._log, self._timeout = compiling, log, timeout
        self._other: Session | None = None
        self._of_session: set[int] = set()
        self._of_other: set[int] = set()

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        compiled = self._compiling(request)
        if not self._of_other:  # those of one call are all written by one
            wait([compiled], self._timeout)
            if compiled.done():
                self._session.submit(request)
                self._of_session.add(request.id)
                return
        if self._other is None:
            self._log("compiling the kernels that generate; they are kept for the next time")
            self._other = self._make_other()
        self._other.submit(request)
        self._of_other.add(request.id)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on for so many seconds; see `Session`."""
        events = []
        if self._of_session:
            events += self._session.step(seconds)
        if self._of_other:
            assert self._other is not None
            events += self._other.step(seconds)
        ended = {event.id for event in events if event.finish is not None}
        self._of_session -= ended
        self._of_other -= ended
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if id in self._of_session:
            self._session.cancel(id)
        elif id in self._of_other:
            assert self._other is not None
            self._other.cancel(id)

    def close(self) -> None:
        """End all requests."""
        self._session.close()
        if self._other is not None:
            self._other.close()
        self._of_session.clear()
        self._of_other.clear()
