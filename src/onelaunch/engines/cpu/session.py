"""A session of the CPU engine: texts grow in one compiled call, many tokens in a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request, not_finite
from onelaunch.engines.cpu.layout import End
from onelaunch.engines.cpu.runtime import CachedText, Launches, Runtime
from onelaunch.engines.engine import Finish, Request, TokenEvent
from onelaunch.engines.reference import CachedRows
from onelaunch.engines.sampling import request_uniforms
from onelaunch.engines.session import RowSession, new_tokens

FINISH: dict[End, Finish] = {End.STOP: "stop", End.LIMIT: "length"}


class CpuSession:
    """A `Session` of up to `max_batch` texts at once, and `max_len` positions of each.

    `runtime` gives the compiled program's runtime, or None while it is not there; until then the
    steps are those of the reference engine's session, which `begin` opens, and its texts are then
    handed over in their middle. `alone` is held during a step. `launches` are the calls of a
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
        self._growing: list[tuple[Request, CachedText]] = []
        self._events: list[TokenEvent] = []
        self._reference: tuple[RowSession, CachedRows] | None = None

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        if self._reference is not None:
            self._reference[0].submit(request)
        else:
            self._waiting.append(request)

    def step(self) -> list[TokenEvent]:
        """Let all texts grow until one has its first token or ends, or for some 20 ms."""
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
                self._grow(runtime)
            events, self._events = self._events, []
            return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if self._reference is not None:
            self._reference[0].cancel(id)
            return
        waiting = [request for request in self._waiting if request.id != id]
        growing = [pair for pair in self._growing if pair[0].id != id]
        if len(waiting) + len(growing) < len(self._waiting) + len(self._growing):
            self._waiting, self._growing = deque(waiting), growing
            self._events.append(TokenEvent(id, None, None, "cancelled"))

    def close(self) -> None:
        """End all requests."""
        self._waiting.clear()
        self._growing.clear()
        self._events.clear()
        self._reference = None

    def _grow(self, runtime: Runtime) -> None:
        sizes = [text.size for _, text in self._growing]
        runtime.generate([text for _, text in self._growing], self._launches)
        for (request, text), size in zip(self._growing, sizes, strict=True):
            self._report(runtime, request, text, size)
        self._growing = [pair for pair in self._growing if pair[1].end == End.NONE]

    def _report(self, runtime: Runtime, request: Request, text: CachedText, size: int) -> None:
        """The events of what came to a text after its first `size` tokens."""
        finish, error = FINISH.get(text.end), None
        if text.end == End.NOT_FINITE:
            finish, error = "error", not_finite(text.size - 1, runtime.dtype)
        for i, token in enumerate(text.ids[size : text.size].tolist(), size - text.prompt):
            self._events.append(TokenEvent(request.id, token, text.logprob(i)))
        if finish == "length":
            self._events[-1] = self._events[-1]._replace(finish=finish)
        elif finish is not None:
            self._events.append(TokenEvent(request.id, None, None, finish, error))

    def _join(self, runtime: Runtime, request: Request) -> None:
        n = new_tokens(self._config, request, self._max_len)
        if n:
            self._growing.append((request, self._text(runtime, request, n)))
        else:
            self._events.append(TokenEvent(request.id, None, None, "length"))

    def _text(self, runtime: Runtime, request: Request, n: int) -> CachedText:
        uniforms = request_uniforms(request, n)
        return CachedText(
            runtime,
            request.prompt_ids,
            n,
            request.sampling,
            uniforms,
            request.stop_ids,
            request.logprobs,
        )

    def _step_by_reference(self) -> list[TokenEvent]:
        if self._reference is None:
            self._reference = self._begin()
            while self._waiting:
                self._reference[0].submit(self._waiting.popleft())
        events, self._events = self._events, []
        return events + self._reference[0].step()

    def _take_over(self, runtime: Runtime) -> None:
        """Go on with the texts of the reference engine's session."""
        assert self._reference is not None
        session, rows = self._reference
        for row, each in enumerate(session.growing):
            text = self._text(runtime, each.request, each.limit)
            cache = rows.caches[row]
            text.resume(each.new, cache.length)
            for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                text.take_cache(layer, keys[0, :, : cache.length], values[0, :, : cache.length])
            self._growing.append((each.request, text))
        self._waiting.extend(session.waiting)
        self._events += session.take_events()
        self._reference = None
