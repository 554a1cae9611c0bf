"""Two sessions as one: each request is one's or the other's."""

from __future__ import annotations

from collections.abc import Callable

from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent


class Split:
    """Requests that `session` writes, and such that another one writes, which `other` makes for the
    first of them. Each request is written to its end where it began."""

    def __init__(self, session: Session, other: Callable[[], Session]) -> None:
        self._session, self._make_other = session, other
        self._other: Session | None = None
        self._of_session: set[int] = set()
        self.of_other: set[int] = set()
        """The ids of those that the other one is writing."""

    def submit(self, request: Request) -> None:
        """Have `session` write a request."""
        self._session.submit(request)
        self._of_session.add(request.id)

    def submit_to_other(self, request: Request) -> None:
        """Have the other one write a request."""
        if self._other is None:
            self._other = self._make_other()
        self._other.submit(request)
        self.of_other.add(request.id)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """A step of each that has requests; see `Session`."""
        events = []
        if self._of_session:
            events += self._session.step(seconds)
        if self.of_other:
            assert self._other is not None
            events += self._other.step(seconds)
        ended = {event.id for event in events if event.finish is not None}
        self._of_session -= ended
        self.of_other -= ended
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if id in self._of_session:
            self._session.cancel(id)
        elif id in self.of_other:
            assert self._other is not None
            self._other.cancel(id)

    def close(self) -> None:
        """End all requests."""
        self._session.close()
        if self._other is not None:
            self._other.close()
        self._of_session.clear()
        self.of_other.clear()
