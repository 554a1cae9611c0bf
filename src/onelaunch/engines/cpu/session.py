"""A session of the CPU engine: sequences grow in one compiled call, many tokens in a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request, not_finite
from onelaunch.engines.cpu.layout import End
from onelaunch.engines.cpu.runtime import Launches, Runtime
from onelaunch.engines.cpu.sequence import CachedSequence
from onelaunch.engines.engine import STEP_SECONDS, Finish, Request, TokenEvent
from onelaunch.engines.reference import CachedRows
from onelaunch.engines.session import RowSession, new_tokens

FINISH: dict[End, Finish] = {End.STOP: "stop", End.LIMIT: "length"}


class CpuSession:
    """A `Session` of up to `max_batch` sequences at once, and `max_len` positions of each.

    `runtime` returns the compiled program's runtime, or None while it is not there; until then the
    steps are those of the reference engine's session, which `begin` opens, and its sequences are
    then handed over in their middle. `alone` is held during a step. `launches` are the calls of a
    forward; None: one call writes many tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        runtime: Callable[[], Runtime | None],
        begin: Callable[[], tuple[RowSession, CachedRows]],
        alone: AbstractContextManager[object],
        launches: Launches | None,
        max_batch: int,
        max_len: int,
    ) -> None:
        self._config, self._runtime, self._begin = config, runtime, begin
        self._alone, self._launches = alone, launches
        self._max_batch, self._max_len = max_batch, max_len
        self._waiting: deque[Request] = deque()
        self._growing: list[CachedSequence] = []
        self._events: list[TokenEvent] = []
        self._reference: tuple[RowSession, CachedRows] | None = None

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        if self._reference is not None:
            self._reference[0].submit(request)
        else:
            self._waiting.append(request)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Let all sequences grow until one has its first token or ends, or for so many seconds."""
        with self._alone:
            if not (self._waiting or self._growing or self._events or self._reference):
                return []
            runtime = self._runtime()
            if runtime is None:
                return self._step_by_reference()
            if self._reference is not None:
                self._take_over(runtime)
            while self._waiting and len(self._growing) < self._max_batch:
                self._join(runtime, self._waiting.popleft())
            if self._growing:
                self._grow(runtime, seconds)
            events, self._events = self._events, []
            return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if self._reference is not None:
            self._reference[0].cancel(id)
            return
        waiting = [request for request in self._waiting if request.id != id]
        growing = [seq for seq in self._growing if seq.request.id != id]
        if len(waiting) + len(growing) < len(self._waiting) + len(self._growing):
            self._waiting, self._growing = deque(waiting), growing
            self._events.append(TokenEvent(id, None, None, "cancelled"))

    def close(self) -> None:
        """End all requests."""
        self._waiting.clear()
        self._growing.clear()
        self._events.clear()
        self._reference = None

    def _grow(self, runtime: Runtime, seconds: float) -> None:
        sizes = [seq.size for seq in self._growing]
        runtime.generate(self._growing, self._launches, seconds)
        for seq, size in zip(self._growing, sizes, strict=True):
            self._report(runtime, seq, size)
        self._growing = [seq for seq in self._growing if seq.end == End.NONE]

    def _report(self, runtime: Runtime, seq: CachedSequence, size: int) -> None:
        """The events of what came to a sequence after its first `size` tokens."""
        id, finish, error = seq.request.id, FINISH.get(seq.end), None
        if seq.end == End.NOT_FINITE:
            finish, error = "error", not_finite(seq.size - 1, runtime.dtype)
        for i, token in enumerate(seq.ids[size : seq.size].tolist(), size - seq.prompt):
            self._events.append(TokenEvent(id, token, seq.logprob(i), top=seq.top(i)))
        if finish == "length":
            self._events[-1] = self._events[-1]._replace(finish=finish)
        elif finish is not None:
            self._events.append(TokenEvent(id, None, None, finish, error))

    def _join(self, runtime: Runtime, request: Request) -> None:
        n = new_tokens(self._config, request, self._max_len)
        if n:
            self._growing.append(CachedSequence(self._config, runtime.program.lanes, request, n))
        else:
            self._events.append(TokenEvent(request.id, None, None, "length"))

    def _step_by_reference(self) -> list[TokenEvent]:
        if self._reference is None:
            self._reference = self._begin()
            while self._waiting:
                self._reference[0].submit(self._waiting.popleft())
        events, self._events = self._events, []
        return events + self._reference[0].step()

    def _take_over(self, runtime: Runtime) -> None:
        """Go on with the sequences of the reference engine's session."""
        assert self._reference is not None
        (session, rows), lanes = self._reference, runtime.program.lanes
        for row, each in enumerate(session.growing):
            seq = CachedSequence(self._config, lanes, each.request, each.limit)
            cache = rows.caches[row]
            seq.resume(each.new, cache.length)
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                seq.take_cache(layer, keys[0, :, : cache.length], values[0, :, : cache.length])
            self._growing.append(seq)
        self._waiting.extend(session.waiting)
        self._events += session.take_events()
        self._reference = None
