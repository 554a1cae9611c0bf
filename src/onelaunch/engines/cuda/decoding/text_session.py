"""A session of the CUDA engine for one sequence at once, whose tokens one launch writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request
from onelaunch.engines.cuda.calls import compile_together
from onelaunch.engines.cuda.decoding import sampling
from onelaunch.engines.cuda.decoding.prefill import Prompts
from onelaunch.engines.cuda.decoding.session import MAX_SECONDS, Growing, notice, take
from onelaunch.engines.cuda.decoding.text import Text, TextKernel
from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent
from onelaunch.engines.session import new_tokens

FIRST_TOKENS = 8
"""Of a kernel's first launch, when it is not known how long a token takes."""


class Writer(Protocol):
    """What writes one sequence's tokens, one launch at a time: `Text`."""

    @property
    def token_seconds(self) -> float | None:
        """That a token of the last launch took."""

    def stop_at(self, ids: Sequence[int]) -> None:
        """Set the ids that end a text."""

    def launch(self, slot: int, token: int, position: int, n: int) -> None:
        """Begin to write `n` tokens after one at a position."""

    def wait_for_one(self) -> None:
        """Until there is a token, or the launch has ended."""

    def arrived(self, first: int = 0) -> tuple[list[int], list[float]]:
        """Tokens so far and their logprobs, from number `first` on."""

    def finish(self, first: int = 0) -> tuple[list[int], list[float], int]:
        """Wait for the end: the rest of them, and what ended the launch."""

    def close(self) -> None:
        """Wait for the end."""


class Source(Protocol):
    """Where a session's writer and its cache come from: `OnGPU`."""

    def writer(self, prompt: int) -> Writer:
        """What writes; `prompt` is how many tokens the first prompt has."""

    def keep(self, prompt_ids: Sequence[int]) -> None:
        """Read a prompt's keys and values into the cache."""

    def close(self) -> None:
        """Let go of the cache."""


class TextSession:
    """A `Session` of one sequence at once: greedy texts by a writer, in launches of MAX_SECONDS,
    the next one under way while the last one's tokens are handed on; drawn ones by `others`."""

    def __init__(
        self,
        config: ModelConfig,
        source: Source,
        others: Callable[[], Session],
        alone: Callable[[], AbstractContextManager[None]],
        max_len: int,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._source = config, source
        self._make_others, self._alone = others, alone
        self._max_len, self._dtype = max_len, dtype
        self._waiting: deque[Request] = deque()
        self._growing: Growing | None = None
        self._drawn: int | None = None  # the request that `others` has
        self._events: list[TokenEvent] = []
        self._writer: Writer | None = None
        self._others: Session | None = None
        self._launched = self._reported = 0  # tokens of the launch under way

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        self._waiting.append(request)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on for so many seconds, and let the next request begin; see `Session`."""
        if self._growing is None and self._drawn is None and self._waiting:
            self._begin(self._waiting.popleft())
        if self._growing is not None:
            with self._alone():
                self._go_on(self._growing, seconds)
        elif self._drawn is not None:
            assert self._others is not None
            events = self._others.step(seconds)
            if any(event.finish is not None for event in events):
                self._drawn = None
            self._events += events
        events, self._events = self._events, []
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if self._drawn == id:
            assert self._others is not None
            self._others.cancel(id)
            return
        waiting = [request for request in self._waiting if request.id != id]
        growing = self._growing is not None and self._growing.request.id == id
        if growing or len(waiting) < len(self._waiting):
            self._waiting = deque(waiting)
            self._growing = None if growing else self._growing
            self._events.append(TokenEvent(id, None, None, "cancelled"))

    def close(self) -> None:
        """End all requests."""
        if self._others is not None:
            self._others.close()
        if self._writer is not None:
            self._writer.close()
        self._source.close()
        self._waiting.clear()
        self._events.clear()
        self._growing = self._drawn = self._writer = self._others = None

    def _begin(self, request: Request) -> None:
        """Read all of a prompt but its last token, from which the text goes on."""
        if not request.sampling.greedy:
            if self._others is None:
                self._others = self._make_others()
            self._others.submit(request)
            self._drawn = request.id
            return
        limit = new_tokens(self._config, request, self._max_len)
        if not limit:
            self._events.append(TokenEvent(request.id, None, None, "length"))
            return
        with self._alone():
            if self._writer is None:
                self._writer = self._source.writer(len(request.prompt_ids))
            elif self._launched:  # of a text that was cancelled
                self._finish(self._writer)
            self._writer.stop_at(request.stop_ids)
            self._source.keep(request.prompt_ids[:-1])
            self._growing = Growing(request, 0, limit)

    def _go_on(self, each: Growing, seconds: float) -> None:
        writer = self._writer
        assert writer is not None
        if not self._launched:
            self._launch(writer, each, seconds)
        if not each.new:
            # it is handed on at once, while the launch goes on
            writer.wait_for_one()
            tokens, logprobs = writer.arrived()
            if tokens:
                self._reported = len(tokens)
                how = sampling.FULL if len(tokens) >= each.limit else sampling.GROWING
                self._take(each, tokens, logprobs, how)
                return
        tokens, logprobs, how = self._finish(writer)
        if how == sampling.FULL and len(each.new) + len(tokens) < each.limit:
            how = sampling.GROWING
            after = Growing(each.request, each.slot, each.limit, [*each.new, *tokens])
            self._launch(writer, after, seconds)
        self._take(each, tokens, logprobs, how)

    def _launch(self, writer: Writer, each: Growing, seconds: float) -> None:
        """Begin to write after its last token, for as long as one launch may take."""
        tokens = FIRST_TOKENS
        if writer.token_seconds is not None:
            tokens = max(1, int(min(seconds, MAX_SECONDS) / writer.token_seconds))
        tokens = min(tokens, each.limit - len(each.new))
        last = each.new[-1] if each.new else each.request.prompt_ids[-1]
        writer.launch(each.slot, last, each.position, tokens)
        self._launched, self._reported = tokens, 0

    def _finish(self, writer: Writer) -> tuple[list[int], list[float], int]:
        """What no step has handed on of the launch under way, when it has ended."""
        first, self._launched, self._reported = self._reported, 0, 0
        return writer.finish(first)

    def _take(
        self, each: Growing, tokens: Sequence[int], logprobs: Sequence[float], how: int
    ) -> None:
        events = take(each, tokens, logprobs, how, self._dtype)
        self._events += events
        if events and events[-1].finish is not None:
            self._growing = None


class OnGPU:
    """A `Source`: a cache, (L, 1, K, context, E) each of keys and values, made, and kernels,
    compiled, when the first text begins."""

    def __init__(
        self,
        prompts: Prompts,
        kernel: Callable[[], TextKernel],
        cache: Callable[[], tuple[Tensor, Tensor]],
        log: Callable[[str], None],
    ) -> None:
        self._prompts, self._kernel, self._make_cache = prompts, kernel, cache
        self._cache: tuple[Tensor, Tensor] | None = None
        self._log = log

    def writer(self, prompt: int) -> Text:
        """What writes into the cache."""
        self._cache = self._make_cache()
        with notice(self._log), ThreadPoolExecutor(1) as pool:
            made = pool.submit(self._kernel)  # one compiler beside the other
            if prompt > 1:
                compile_together(self._prompts.calls(prompt - 1, with_logits=False))
            return Text(made.result(), *self._cache)

    def keep(self, prompt_ids: Sequence[int]) -> None:
        """A prompt's keys and values into the cache."""
        assert self._cache is not None
        keys, values = self._cache
        self._prompts.keep(prompt_ids, keys[:, 0], values[:, 0])

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None
