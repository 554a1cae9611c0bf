"""Continuous batching: one thread steps an engine's session, requests join and leave."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from onelaunch.engines.engine import STEP_SECONDS, Engine, Request, Session, TokenEvent

Events = list[TokenEvent]
FAILURES = 3
"""After so many failed steps in a row the engine counts as broken."""


@dataclass(frozen=True)
class Ticket:
    """A request under way. `deliver` is called in the batcher's thread with its new events: it must
    return at once, and must not raise."""

    request: Request
    deliver: Callable[[Events], None]

    @property
    def id(self) -> int:
        return self.request.id


@dataclass(frozen=True)
class _Cancel:
    ids: frozenset[int]


@dataclass(frozen=True)
class _Describe:
    answer: Future[dict[str, Any]] = field(default_factory=Future)


_Order = Sequence[Ticket] | _Cancel | _Describe | None
"""None: to end."""


class Batcher:
    """Runs the requests of any number of threads on one engine, `max_batch` of them at once.

    The others wait in the order of their arrival. A request's last event has its finish reason, one
    that was cancelled has no further events. If a step fails, all requests that were growing end
    with that error, and the next one begins a new session; after `FAILURES` failures in a row
    `broken` is the last error's text.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int,
        max_len: int,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.max_batch, self.broken = max_batch, ""
        self._engine, self._max_len, self._log = engine, max_len, log
        self._ids = itertools.count()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._growing: dict[int, Ticket] = {}
        self._slots: list[int | None] = [None] * max_batch
        self._session: Session | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="onelaunch batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: Iterable[tuple[Request, Callable[[Events], None]]]) -> list[Ticket]:
        """Add requests, whose ids are replaced by unique ones; see `Ticket`."""
        tickets = [
            Ticket(replace(request, id=next(self._ids)), deliver) for request, deliver in requests
        ]
        self._orders.put(tickets)
        return tickets

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """End requests; those that have ended are left alone."""
        ids = frozenset(ticket.id for ticket in tickets)
        if ids:
            self._orders.put(_Cancel(ids))

    def describe(self) -> Future[dict[str, Any]]:
        """What the engine says of itself, which is for one thread at a time: between two steps."""
        order = _Describe()
        self._orders.put(order)
        return order.answer

    @property
    def slots(self) -> list[int | None]:
        """The id of the request in each slot; None for a free one."""
        return list(self._slots)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    def close(self) -> None:
        """End all requests without events, and the thread."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._admit()
                if self._growing:
                    self._step()
        finally:
            self._close_session()

    def _take_orders(self) -> bool:
        """Take what was ordered; waits for an order where there is nothing else to do. False: to
        end."""
        idle = not (self._growing or self._waiting)
        while True:
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if order is None:
                return False
            if isinstance(order, _Cancel):
                self._end(order.ids)
            elif isinstance(order, _Describe):
                _answer(order.answer, self._engine.describe)
            else:
                self._waiting.extend(order)

    def _end(self, ids: frozenset[int]) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if ticket.id not in ids)
        for id_ in ids & self._growing.keys():
            self._leave(id_)
            if self._session is not None:
                self._session.cancel(id_)

    def _leave(self, id_: int) -> None:
        del self._growing[id_]
        self._slots[self._slots.index(id_)] = None

    def _admit(self) -> None:
        while self._waiting and len(self._growing) < self.max_batch:
            ticket = self._waiting.popleft()
            try:
                if self._session is None:
                    self._session = self._engine.session(self.max_batch, self._max_len)
                self._session.submit(ticket.request)
            except Exception as error:
                ticket.deliver([TokenEvent(ticket.id, None, None, "error", error)])
                continue
            self._growing[ticket.id] = ticket
            self._slots[self._slots.index(None)] = ticket.id

    def _step(self) -> None:
        assert self._session is not None
        try:
            events = self._session.step(STEP_SECONDS)
        except Exception as error:
            self._fail(error)
            return
        self._failures = 0
        by_request: dict[int, Events] = {}
        for event in events:
            if event.id in self._growing:  # not one that was cancelled
                by_request.setdefault(event.id, []).append(event)
        for id_, new in by_request.items():
            ticket = self._growing[id_]
            if new[-1].finish is not None:
                self._leave(id_)
            ticket.deliver(new)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            self.broken = str(error) or type(error).__name__
        self._log(f"a step failed, its {len(self._growing)} requests end: {error}")
        failed = list(self._growing.values())
        for ticket in failed:
            self._leave(ticket.id)
        self._close_session()
        for ticket in failed:
            ticket.deliver([TokenEvent(ticket.id, None, None, "error", error)])

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _answer(future: Future[dict[str, Any]], function: Callable[[], dict[str, Any]]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
