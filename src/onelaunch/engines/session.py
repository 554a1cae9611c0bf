"""A session in PyTorch: requests that join, grow by a token in each step, and leave."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request, not_finite
from onelaunch.engines.engine import STEP_SECONDS, Finish, Request, TokenEvent
from onelaunch.engines.sampling import adjusted, draw, most_likely, request_uniforms


class Rows(Protocol):
    """The model's side of a session: sequences in rows 0, 1, ... without a gap."""

    def read(self, row: int, prompt_ids: Sequence[int]) -> Tensor:
        """Read a new sequence's prompt into a row; the last position's logits, (1, V) in
        float32."""

    def step(self, token_B: Tensor) -> Tensor:
        """Read one more token of each row, from any device; their logits, (B, V) in float32."""

    def move(self, source: int, row: int) -> None:
        """Put a row's sequence in the place of another's, which has left."""


@dataclass(slots=True)
class Growing:
    """A request that has joined: at most `limit` new tokens, `new` so far."""

    request: Request
    limit: int
    uniforms_N: Tensor | None
    new: list[int] = field(default_factory=list)


def choose(each: Growing, logits_V: Tensor) -> int:
    """The next token of a request, whose largest logit is finite."""
    request, n = each.request, len(each.new)
    sampling = request.sampling
    if sampling.adjusts:
        logits_V = adjusted(logits_V, sampling, request.prompt_ids, each.new)
    if each.uniforms_N is None:
        return int(logits_V.argmax())
    return int(draw(logits_V, sampling, each.uniforms_N[n : n + 1]))


def new_tokens(config: ModelConfig, request: Request, max_len: int) -> int:
    """How many new tokens a request can have at most, in a session of `max_len` positions."""
    room = min(config.max_seq_len, max_len) - len(request.prompt_ids) + 1
    return max(0, min(request.max_new_tokens, room))


class RowSession:
    """A `Session` over `rows` of which `max_batch` may be in use; `dtype` is named in errors."""

    def __init__(
        self, config: ModelConfig, rows: Rows, max_batch: int, max_len: int, dtype: str
    ) -> None:
        self._config, self._rows = config, rows
        self._max_batch, self._max_len, self._dtype = max_batch, max_len, dtype
        self.waiting: deque[Request] = deque()
        self.growing: list[Growing] = []  # by row
        self._events: list[TokenEvent] = []
        self._token_B: Tensor | None = None  # the rows' last tokens, where they lie on the device

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """One token more of each growing request, and the first of those that join."""
        if self.growing:
            if self._token_B is None:
                self._token_B = torch.tensor([each.new[-1] for each in self.growing])
            self._take(self._rows.step(self._token_B), 0)
        while self.waiting and len(self.growing) < self._max_batch:
            self._join(self.waiting.popleft())
        return self.take_events()

    def take_events(self) -> list[TokenEvent]:
        """The events so far that no step has returned."""
        events, self._events = self._events, []
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        for request in self.waiting:
            if request.id == id:
                self.waiting.remove(request)
                self._end(id, "cancelled")
                return
        for row, each in enumerate(self.growing):
            if each.request.id == id:
                self._leave(row)
                self._end(id, "cancelled")
                return

    def close(self) -> None:
        """End all requests."""
        self.waiting.clear()
        self.growing.clear()
        self._events.clear()

    def _join(self, request: Request) -> None:
        limit = new_tokens(self._config, request, self._max_len)
        if not limit:
            self._end(request.id, "length")
            return
        row = len(self.growing)
        logits_1V = self._rows.read(row, request.prompt_ids)
        uniforms_N = request_uniforms(request, limit)
        if uniforms_N is not None:
            uniforms_N = uniforms_N.to(logits_1V.device)
        self.growing.append(Growing(request, limit, uniforms_N))
        self._take(logits_1V, row)

    def _take(self, logits_BV: Tensor, first: int) -> None:
        """Choose a token for each of the rows from `first` on; those that end leave."""
        best_B, self._token_B = logits_BV.max(-1)
        chosen = self._token_B.tolist()
        as_chosen = first == 0
        ended = []
        for i, best in enumerate(best_B.tolist()):
            row, each = first + i, self.growing[first + i]
            request = each.request
            if not math.isfinite(best):
                position = len(request.prompt_ids) + len(each.new) - 1
                self._end(request.id, "error", not_finite(position, self._dtype))
                ended.append(row)
                continue
            token = chosen[i]
            if each.uniforms_N is not None or request.sampling.adjusts:
                token, as_chosen = choose(each, logits_BV[i]), False
            if token in request.stop_ids:
                self._end(request.id, "stop")
                ended.append(row)
                continue
            each.new.append(token)
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if request.logprobs or request.top_logprobs:
                logprobs_V = logits_BV[i].log_softmax(-1)
                logprob = float(logprobs_V[token]) if request.logprobs else None
                top = most_likely(logprobs_V, request.top_logprobs)
            finish: Finish | None = "length" if len(each.new) >= each.limit else None
            self._events.append(TokenEvent(request.id, token, logprob, finish, top=top))
            if finish:
                ended.append(row)
        for row in reversed(ended):
            self._leave(row)
        if not as_chosen:
            self._token_B = None

    def _leave(self, row: int) -> None:
        """Free a row: the last one takes its place."""
        self._token_B = None
        last = self.growing.pop()
        if row < len(self.growing):
            self._rows.move(len(self.growing), row)
            self.growing[row] = last

    def _end(self, id: int, finish: Finish, error: Exception | None = None) -> None:
        self._events.append(TokenEvent(id, None, None, finish, error))
