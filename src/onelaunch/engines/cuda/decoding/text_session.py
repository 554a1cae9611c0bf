"""A session of the CUDA engine for sequences whose tokens one launch writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request
from onelaunch.engines.cuda.calls import compile_together
from onelaunch.engines.cuda.decoding import sampling
from onelaunch.engines.cuda.decoding.options import check_kernels
from onelaunch.engines.cuda.decoding.prefill import Prompts, Reading
from onelaunch.engines.cuda.decoding.session import MAX_SECONDS, Growing, in_turn, notice, take
from onelaunch.engines.cuda.decoding.text import Ended, Row, Text, TextKernel
from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent
from onelaunch.engines.session import new_tokens
from onelaunch.errors import RunFailed

ARRIVE_SECONDS = 1e-3
"""So often tokens of a last launch are handed on."""
FIRST_TOKENS = 8
"""Of a kernel's first launch, when it is not known how long a token takes, and at most of one
between two chunks of a prompt."""


@dataclass(slots=True, eq=False)
class Written(Growing):
    """A text in a slot. `ahead`: how many tokens no event has handed on, but the launch under way
    goes on from, and `last` the last of them. `left`: what else is written of it is of no
    interest."""

    ahead: int = 0
    last: int = 0
    left: bool = False


class Writer(Protocol):
    """What writes sequences' tokens, one launch at a time: `Text`."""

    @property
    def token_seconds(self) -> float | None:
        """That a token of each sequence took in the last launch."""

    def prepare(self, row: int, slot: int, request: Request, limit: int) -> None:
        """Set the ids that end the text of a row of the launches to come, and by what up to `limit`
        tokens are drawn."""

    def launch(self, rows: Sequence[Row]) -> None:
        """Begin to write; each row is prepared."""

    def go_on(self, n: int) -> None:
        """Begin to write n more tokens of each row of the launch that has ended, in which none of
        them has."""

    def wait_for_one(self, rows: Sequence[int]) -> None:
        """Until there is a token of each of these, or the launch has ended."""

    def ends_within(self, seconds: float) -> bool:
        """Wait for so long, or until the launch has ended; whether it has."""

    def arrived(self, row: int, first: int = 0) -> tuple[list[int], list[float]]:
        """A row's tokens so far and their logprobs, from number `first` on."""

    def finish(self, firsts: Sequence[int]) -> list[Ended]:
        """Wait for the end: the rest of each row's, and what ended it."""

    def close(self) -> None:
        """Wait for the end."""


class Source(Protocol):
    """Where a session's writer and its cache come from: `OnGPU`."""

    def writer(self, draws: bool, prompt: int) -> Writer:
        """What writes the most likely tokens alone, or whatever is requested; `prompt` is how many
        tokens the first prompt has."""

    def begin(self, prompt_ids: Sequence[int], slot: int) -> Reading:
        """A prompt whose keys and values are to be read into the cache."""

    def compilation(self, draws: bool, prompt: int) -> Callable[[], None] | None:
        """What compiles what `writer` and `begin` need, in any thread; None where it is there."""

    def close(self) -> None:
        """Let go of the cache."""


class TextSession:
    """A `Session` of up to `max_batch` sequences at once, by a writer in launches of MAX_SECONDS,
    the next one under way while the last one's tokens are handed on. Where no writer can be made
    they are those of `others`: `failed` gets the error, and may raise it."""

    def __init__(
        self,
        config: ModelConfig,
        source: Source,
        others: Callable[[], Session],
        alone: Callable[[], AbstractContextManager[None]],
        max_batch: int,
        max_len: int,
        dtype: torch.dtype,
        failed: Callable[[RunFailed], None],
    ) -> None:
        self._config, self._source, self._failed = config, source, failed
        self._make_others, self._alone = others, alone
        self._max_batch, self._max_len, self._dtype = max_batch, max_len, dtype
        self._waiting: deque[Request] = deque()
        self._joining: deque[Written] = deque()
        self._growing: list[Written] = []
        self._away: set[int] = set()  # requests that `others` has
        self._events: list[TokenEvent] = []
        self._writes = True  # until no writer could be made
        self._writers: dict[bool, Writer] = {}  # by whether they draw
        self._writer: Writer | None = None  # of the launch under way, or the last one
        self._others: Session | None = None
        # the launch under way: its sequences, and how many of its tokens of each are handed on
        self._launched: list[Written] = []
        self._handed: list[int] = []
        self._is_last = False  # none of them goes on after it
        self._left_over = 0  # so many more tokens, at least, each may have after it

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        check_kernels(request)
        if self._writes:
            self._waiting.append(request)
        else:
            self._give_away(request)

    def compilation(self, request: Request) -> Callable[[], None] | None:
        """What compiles what a request needs, in any thread; None where it is there."""
        return self._source.compilation(_draws(request), len(request.prompt_ids))

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on for so many seconds, and let those join that wait; see `Session`."""
        if self._waiting or self._joining or self._growing:
            with self._alone():
                self._go_on(seconds)
        if self._away:
            assert self._others is not None
            events = self._others.step(seconds)
            self._away -= {event.id for event in events if event.finish is not None}
            self._events += events
        events, self._events = self._events, []
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        if id in self._away:
            assert self._others is not None
            self._others.cancel(id)
            return
        waiting = [request for request in self._waiting if request.id != id]
        joining = [each for each in self._joining if each.request.id != id]
        growing = [each for each in self._growing if each.request.id == id]
        known = len(self._waiting) + len(self._joining)
        if growing or len(waiting) + len(joining) < known:
            self._waiting, self._joining = deque(waiting), deque(joining)
            for each in growing:
                self._leave(each)
            self._events.append(TokenEvent(id, None, None, "cancelled"))

    def close(self) -> None:
        """End all requests."""
        if self._others is not None:
            self._others.close()
        for writer in self._writers.values():
            writer.close()
        self._source.close()
        self._writers.clear()
        self._waiting.clear()
        self._joining.clear()
        self._growing.clear()
        self._away.clear()
        self._events.clear()
        self._launched = []
        self._writer = self._others = None

    def _go_on(self, seconds: float) -> None:
        if not self._launched:
            self._join()
            self._read(seconds)
            self._launch(seconds)
        writer = self._writer
        if writer is None or not self._launched:
            return
        fresh = [
            row for row, each in enumerate(self._launched) if not (each.new or each.left)
        ]  # fmt: skip
        if fresh:
            # first tokens are handed on at once, while the launch goes on
            writer.wait_for_one(fresh)
            if self._hand_on(writer):
                return
        # and those of a launch that none may follow
        while self._is_last and not self._waiting and not writer.ends_within(ARRIVE_SECONDS):
            if self._hand_on(writer):
                return
        rows, ends = self._launched, writer.finish(self._handed)
        tokens = self._tokens(writer, seconds)
        if (
            tokens < self._left_over
            and not (self._waiting or self._joining)
            and all(end.how == sampling.FULL for end in ends)
            and not any(each.left for each in rows)
        ):
            # no sequence joins or leaves: what is done for each is done while the launch goes on
            writer.go_on(tokens)
            self._left_over -= tokens
            self._handed = [0] * len(rows)
            for each, end in zip(rows, ends, strict=True):
                self._take(each, *end.unpacked(), sampling.GROWING)
            return
        self._launched, self._growing = [], []
        for each, end in zip(rows, ends, strict=True):
            n, full = len(end.words), end.how == sampling.FULL
            if full and len(each.new) + n < each.limit and not each.left:
                each.ahead, each.last = n, end.last if n else each.last
                self._growing.append(each)
        self._join()
        self._read(0.0)  # the last launch's tokens are to be handed on
        self._launch(seconds)
        grows = set(map(id, self._growing))
        for each, end in zip(rows, ends, strict=True):
            each.ahead = 0
            how = sampling.GROWING if id(each) in grows else end.how
            self._take(each, *end.unpacked(), how)

    def _hand_on(self, writer: Writer) -> bool:
        """The tokens that there are of a launch under way; whether there were any."""
        before = len(self._events)
        for row, each in enumerate(self._launched):
            tokens, logprobs = writer.arrived(row, self._handed[row])
            self._handed[row] += len(tokens)
            full = len(each.new) + len(tokens) >= each.limit
            self._take(each, tokens, logprobs, sampling.FULL if full else sampling.GROWING)
        return len(self._events) > before

    def _join(self) -> None:
        """Give a slot to each request that there is room for."""
        while self._waiting and len(self._joining) + len(self._growing) < self._max_batch:
            request = self._waiting.popleft()
            limit = new_tokens(self._config, request, self._max_len)
            if not limit:
                self._events.append(TokenEvent(request.id, None, None, "length"))
                continue
            draws = _draws(request)
            if draws not in self._writers:
                try:
                    self._writers[draws] = self._source.writer(draws, len(request.prompt_ids))
                except RunFailed as error:
                    self._failed(error)
                    self._writes = False
                    for each in (request, *self._waiting):
                        self._give_away(each)
                    self._waiting.clear()
                    return
            used = {each.slot for each in (*self._joining, *self._growing)}
            slot = next(i for i in range(self._max_batch) if i not in used)
            # its text goes on from its last token
            reading = self._source.begin(request.prompt_ids[:-1], slot)
            self._joining.append(Written(request, slot, limit, reading))

    def _read(self, seconds: float) -> None:
        """Go on to read prompts; those that are read grow from now on."""
        self._growing += in_turn(self._joining, bool(self._growing), seconds)

    def _give_away(self, request: Request) -> None:
        if self._others is None:
            self._others = self._make_others()
        self._others.submit(request)
        self._away.add(request.id)

    def _launch(self, seconds: float) -> None:
        """Begin to write after each one's last token, for as long as one launch may take."""
        if not self._growing:
            return
        draws = any(_draws(each.request) for each in self._growing)
        # one that draws writes the most likely ones, too
        self._writer = writer = self._writers[draws]
        tokens = self._tokens(writer, seconds)
        rows, left_over = [], []
        for row, each in enumerate(self._growing):
            writer.prepare(row, each.slot, each.request, each.limit)
            new, prompt = len(each.new) + each.ahead, each.request.prompt_ids
            last = each.last if each.ahead else each.new[-1] if each.new else prompt[-1]
            n = min(tokens, each.limit - new)
            rows.append(Row(each.slot, last, len(prompt) + new - 1, n, new))
            left_over.append(each.limit - new - n)
        writer.launch(rows)
        self._left_over = min(left_over)
        self._is_last = not any(left_over) and not self._joining
        self._launched, self._handed = list(self._growing), [0] * len(rows)

    def _tokens(self, writer: Writer, seconds: float) -> int:
        """Of each sequence in a launch of so many seconds."""
        if writer.token_seconds is None:
            return FIRST_TOKENS
        timed = max(1, int(min(seconds, MAX_SECONDS) / writer.token_seconds))
        return min(timed, FIRST_TOKENS) if self._joining else timed

    def _take(
        self, each: Written, tokens: Sequence[int], logprobs: Sequence[float], how: int
    ) -> None:
        """Hand on tokens of a text, and its end."""
        if each.left:
            return
        events = take(each, tokens, logprobs, how, self._dtype)
        self._events += events
        if events and events[-1].finish is not None:
            self._leave(each)

    def _leave(self, each: Written) -> None:
        each.left = True
        self._growing = [other for other in self._growing if other is not each]


def _draws(request: Request) -> bool:
    """Whether its tokens are others than the most likely ones."""
    return not request.sampling.greedy or request.sampling.penalises


class OnGPU:
    """A `Source`: a cache of keys and values, (2, L, slots, K, context, E), made, and kernels,
    compiled, when the first text begins. `kernels` says what compiles the kernel that draws, or the
    one that does not, where that is not done; `kernel` gives it. `together`: whether there may be
    several prompts at once."""

    def __init__(
        self,
        prompts: Prompts,
        kernels: Callable[[bool], Callable[[], object] | None],
        kernel: Callable[[bool], TextKernel],
        cache: Callable[[], Tensor],
        log: Callable[[str], None],
        together: bool = False,
    ) -> None:
        self._prompts, self._compiles, self._together = prompts, kernels, together
        self._kernel, self._make_cache = kernel, cache
        self._cache: Tensor | None = None
        self._log = log

    def writer(self, draws: bool, prompt: int) -> Text:
        """What writes into the cache."""
        if self._cache is None:
            self._cache = self._make_cache()
        if compile := self.compilation(draws, prompt):
            with notice(self._log):
                compile()
        return Text(self._kernel(draws), self._cache[0], self._cache[1])

    def compilation(self, draws: bool, prompt: int) -> Callable[[], None] | None:
        """What compiles what `writer` and `begin` need."""
        calls = self._prompts.calls(prompt - 1, False, together=self._together)
        compile_kernel = self._compiles(draws)
        if not calls and compile_kernel is None:
            return None

        def compile() -> None:
            with ThreadPoolExecutor(1) as pool:  # both compilers at once
                made = None if compile_kernel is None else pool.submit(compile_kernel)
                if calls:
                    compile_together(calls)
                if made is not None:
                    made.result()

        return compile

    def begin(self, prompt_ids: Sequence[int], slot: int) -> Reading:
        """A prompt whose keys and values are to be read into the cache."""
        assert self._cache is not None
        if calls := self._prompts.calls(len(prompt_ids), False, together=self._together):
            with notice(self._log):
                compile_together(calls)
        return self._prompts.begin(prompt_ids, self._cache, slot, with_logits=False)

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None
