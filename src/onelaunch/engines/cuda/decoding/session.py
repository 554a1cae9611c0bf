"""A session of the CUDA engine: sequences grow in graphs of a few tokens, without the host between
one token and the next."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TypeVar

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request, not_finite
from onelaunch.engines.cuda.calls import (
    CallAndProduct,
    captured,
    compile_together,
    prefer_shared_memory,
)
from onelaunch.engines.cuda.decoding import STOP_IDS, sampling
from onelaunch.engines.cuda.decoding.chain import (
    MAX_ROWS,
    ROWS,
    ManyRows,
    Memory,
    TokenChain,
    bucket,
)
from onelaunch.engines.cuda.decoding.options import check_kernels
from onelaunch.engines.cuda.decoding.prefill import Prompts, Reading
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import BoundForward
from onelaunch.engines.engine import STEP_SECONDS, Finish, Request, TokenEvent
from onelaunch.engines.sampling import float32_penalty, request_uniforms
from onelaunch.engines.session import new_tokens

GRAPH_TOKENS = 8
"""Tokens of each sequence in one graph."""
MAX_SECONDS = 0.005
"""Of what is launched at once, so that a request that is cancelled or joins does not wait long, and
of reading prompts while others grow."""
FIRST_CONTEXT = 256
SILENT_SECONDS = 1.0
FINISH: dict[int, Finish] = {sampling.STOPPED: "stop", sampling.FULL: "length"}


@dataclass(slots=True)
class Growing:
    """A request in a slot, whose prompt is read at first: at most `limit` new tokens, `new` so
    far."""

    request: Request
    slot: int
    limit: int
    reading: Reading
    new: list[int] = field(default_factory=list)

    @property
    def newest(self) -> int:
        """Its last token so far."""
        return self.new[-1] if self.new else self.request.prompt_ids[-1]

    @property
    def position(self) -> int:
        """Of its last token."""
        return len(self.request.prompt_ids) + len(self.new) - 1


class CudaSession:
    """A `Session` of up to `max_batch` sequences at once, MAX_ROWS at most, and `max_len` positions
    of each. `alone` is held during a step."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        prompts: Prompts,
        alone: Callable[[], AbstractContextManager[None]],
        max_batch: int,
        max_len: int,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._packed, self._prompts = config, packed, prompts
        self._alone, self._log = alone, log
        self._device = packed.embedding.device
        self._max_batch, self._max_len = min(max_batch, MAX_ROWS), max_len
        self._waiting: deque[Request] = deque()
        self._joining: deque[Growing] = deque()
        self._growing: list[Growing] = []
        self._events: list[TokenEvent] = []
        self._memory: Memory | None = None
        self._seen: Tensor | None = None  # (S, V): the tokens of sequences with a penalty
        self._chains: dict[tuple[int, int, bool], TokenChain] = {}
        self._forward: BoundForward | None = None
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._compiled: set[bool] = set()  # with a penalty, and without
        self._rows_on_host: list[Tensor] = []
        self._rows: list[int] = []  # the slots that the device has in its rows
        self._token_seconds = MAX_SECONDS / GRAPH_TOKENS  # as far as is known

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        check_kernels(request)
        self._waiting.append(request)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Let all sequences grow for so many seconds, and those join that wait; see `Session`."""
        if self._waiting or self._joining or self._growing:
            with self._alone():
                others = bool(self._growing)
                self._join()
                reads = bool(self._joining)
                self._read(seconds)
                # a first token waits for one graph of the others at a time, and for none of its own
                # where its prompt gives it
                if self._growing and (others or not reads or self._many):
                    self._grow(0.0 if reads else seconds)
        events, self._events = self._events, []
        return events

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        waiting = [request for request in self._waiting if request.id != id]
        joining = [each for each in self._joining if each.request.id != id]
        growing = [each for each in self._growing if each.request.id != id]
        known = len(self._waiting) + len(self._joining) + len(self._growing)
        if len(waiting) + len(joining) + len(growing) < known:
            self._waiting, self._joining = deque(waiting), deque(joining)
            self._growing = growing
            self._events.append(TokenEvent(id, None, None, "cancelled"))

    def close(self) -> None:
        """End all requests."""
        self._waiting.clear()
        self._joining.clear()
        self._growing.clear()
        self._events.clear()
        self._graphs.clear()
        self._chains.clear()
        self._memory = self._forward = self._seen = None

    # ---- requests that join

    def _join(self) -> None:
        """Give a slot to each request that there is room for."""
        while self._waiting and len(self._joining) + len(self._growing) < self._max_batch:
            request = self._waiting.popleft()
            limit = new_tokens(self._config, request, self._max_len)
            if not limit:
                self._events.append(TokenEvent(request.id, None, None, "length"))
                continue
            used = {each.slot for each in (*self._joining, *self._growing)}
            slot = next(i for i in range(self._max_batch) if i not in used)
            memory, prompt = self._state(), request.prompt_ids
            if compile := self.compilation(request):
                with notice(self._log):
                    compile()
            ids = prompt[:-1] if self._many else prompt
            reading = self._prompts.begin(ids, memory.cache, slot, with_logits=not self._many)
            self._joining.append(Growing(request, slot, limit, reading))

    def _read(self, seconds: float) -> None:
        """Go on to read prompts; those that are read get their first tokens. Many are read together
        up to their last tokens, which are then read with what the others read."""
        for each in in_turn(self._joining, bool(self._growing), seconds):
            self._begin(each)
            self._growing.append(each)
            if not self._many:
                self._report([each])

    def _begin(self, each: Growing) -> None:
        """Choose the first token of a sequence whose prompt was read, or prepare that."""
        memory, request, slot = self._state(), each.request, each.slot
        sampled, stop = request.sampling, list(request.stop_ids)[:STOP_IDS]
        whole = [0] * sampling.WHOLE_NUMBERS
        whole[sampling.LIMIT] = each.limit
        whole[sampling.TOP_K] = sampled.top_k
        whole[sampling.DRAWN] = int(not sampled.greedy)
        penalty = float32_penalty(sampled.repetition_penalty)
        fraction = [sampled.temperature, sampled.top_p, sampled.min_p, penalty]
        stop += [-1] * (STOP_IDS - len(stop))
        rows = ((memory.whole, whole), (memory.stop, stop), (memory.fraction, fraction))
        for (table, row), pinned in zip(rows, self._pinned(), strict=True):
            pinned.copy_(torch.tensor(row, dtype=table.dtype))
            table[slot].copy_(pinned, non_blocking=True)
        uniforms_N = request_uniforms(request, each.limit)
        if uniforms_N is not None:
            memory.uniforms[slot, : each.limit].copy_(uniforms_N)
        if sampled.penalises:
            self._mark(slot, request.prompt_ids)
        memory.positions[slot] = len(request.prompt_ids) - 1
        self._rows = []
        if self._many:
            memory.progress[slot] = torch.tensor([0, sampling.GROWING])  # it may be another's
            self._wait()
            return
        memory.logits[:1].copy_(each.reading.logits)
        memory.slots[:1] = slot
        self._chain(1, FIRST_CONTEXT, sampled.penalises).sample()
        self._wait()

    def _mark(self, slot: int, ids: Sequence[int]) -> None:
        """Have the tokens of a slot's sequence so far penalised."""
        seen_V = self._seen_tokens()[slot]
        seen_V.zero_()
        seen_V.index_fill_(0, torch.tensor(ids, device=self._device), 1)

    def _seen_tokens(self) -> Tensor:
        """Which tokens each slot's sequence has, (S, V), where it is penalised. Made for the first
        one, and stays where it is: CUDA graphs have its address."""
        if self._seen is None:
            shape = self._max_batch + 1, self._config.vocab_size
            self._seen = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._seen

    # ---- sequences that grow

    def _grow(self, seconds: float) -> None:
        longest = max(each.position for each in self._growing)
        tokens = max(1, int(min(seconds, MAX_SECONDS) / self._token_seconds))
        tokens = min(tokens, max(each.limit - len(each.new) for each in self._growing))
        graphs = -(-tokens // GRAPH_TOKENS)
        reached = min(self._max_len, longest + graphs * GRAPH_TOKENS + 1)
        rows = max(self._least_rows(), bucket(len(self._growing)))
        context = min(self._max_len, max(FIRST_CONTEXT, bucket(reached)))
        self._place(rows)
        penalised = any(each.request.sampling.penalises for each in self._growing)
        run = self._run(rows, context, penalised)
        start = time.perf_counter()
        for _ in range(graphs):
            run()
        self._wait()
        took = (time.perf_counter() - start) / (graphs * GRAPH_TOKENS)
        if not self._joining:  # or a chunk of a prompt is in it
            self._token_seconds = took
        self._report(self._growing)

    def _least_rows(self) -> int:
        """Sequences that leave make no other kernels: those of a CTA, or, of more, all."""
        rows = bucket(self._max_batch)
        return rows if self._many else min(ROWS, rows)

    def compilation(self, request: Request) -> Callable[[], None] | None:
        """What compiles what a request needs, before the first one all, in any thread; None where
        it is there."""
        if self._device.type != "cuda":
            return None
        penalised = request.sampling.penalises
        if self._many:
            calls = self._prompts.calls(len(request.prompt_ids) - 1, False, together=True)
        else:
            calls = self._prompts.calls(len(request.prompt_ids), with_logits=True)
        if penalised not in self._compiled:
            self._compiled.add(penalised)
            calls += self._chain(self._least_rows(), FIRST_CONTEXT, penalised).distinct
        return partial(compile_together, calls) if calls else None

    def _place(self, rows: int) -> None:
        """The sequences in their rows, each with its last token's row of the embedding."""
        slots = [each.slot for each in self._growing]
        if slots == self._rows:
            return
        memory, unused = self._state(), rows - len(slots)
        placed = torch.tensor([*slots, *[self._max_batch] * unused], dtype=torch.int32)
        memory.slots[:rows].copy_(placed)
        last = torch.tensor([each.newest for each in self._growing] + [0] * unused)
        if self._many:
            buffers = self._many_rows().buffers
            assert buffers.positions is not None
            buffers.tokens.copy_(last)
            at = [each.position for each in self._growing] + [0] * unused
            buffers.positions.copy_(torch.tensor(at, dtype=torch.int32))
        else:
            ids = last.to(self._device)
            torch.index_select(self._packed.embedding, 0, ids, out=memory.x[:rows])
        self._rows = slots

    def _run(self, rows: int, context: int, penalised: bool) -> Callable[[], None]:
        """What lets so many rows grow by GRAPH_TOKENS tokens."""
        calls = self._chain(rows, context, penalised).calls

        def launch() -> None:
            for _ in range(GRAPH_TOKENS):
                for call in calls:
                    call()

        if self._device.type != "cuda":
            return launch
        key = (rows, context, penalised)
        if key not in self._graphs:
            for call in calls:
                prefer_shared_memory(call.load())
                if isinstance(call, CallAndProduct):
                    # a library loads its kernel at its first use, which no capture may see
                    call.multiply(call.to)
            torch.cuda.synchronize(self._device)
            self._graphs[key] = captured(launch, self._device)
        return self._graphs[key].replay

    def _chain(self, rows: int, context: int, penalised: bool) -> TokenChain:
        key, memory = (rows, context, penalised), self._state()
        seen = self._seen_tokens() if penalised else None
        if key not in self._chains:
            if self._many and rows > 1:
                chain: TokenChain = ManyRows(
                    self._config, self._packed, memory, self._many_rows(), context, seen
                )
            else:
                chain = TokenChain(self._config, self._packed, memory, rows, context, seen)
            self._chains[key] = chain
        return self._chains[key]

    @property
    def _many(self) -> bool:
        """Whether products are the forward's."""
        return self._max_batch > ROWS

    def _many_rows(self) -> BoundForward:
        if self._forward is None:
            rows = bucket(self._max_batch)
            self._forward = ManyRows.forward(self._config, self._packed, rows)
        return self._forward

    def _state(self) -> Memory:
        if self._memory is None:
            self._memory = Memory.of(self._config, self._packed, self._max_batch, self._max_len)
        return self._memory

    def _pinned(self) -> list[Tensor]:
        """Memory from which a request's numbers are copied, free again when its first token is
        there."""
        if not self._rows_on_host:
            memory, pinned = self._state(), self._device.type == "cuda"
            self._rows_on_host = [
                torch.empty(table.shape[1], dtype=table.dtype, pin_memory=pinned)
                for table in (memory.whole, memory.stop, memory.fraction)
            ]
        return self._rows_on_host

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _report(self, sequences: Sequence[Growing]) -> None:
        """The events of what came to sequences; those that ended leave."""
        memory = self._state()
        ended = set()
        for each in sequences:
            before = len(each.new)
            count, how = memory.progress[each.slot].tolist()
            tokens = memory.tokens[each.slot, before:count].tolist()
            logprobs = memory.logprobs[each.slot, before:count].tolist()
            events = take(each, tokens, logprobs, how, self._packed.embedding.dtype)
            self._events += events
            if events and events[-1].finish is not None:
                ended.add(each.slot)
        self._growing = [each for each in self._growing if each.slot not in ended]


def take(
    each: Growing, tokens: Sequence[int], logprobs: Sequence[float], how: int, dtype: torch.dtype
) -> list[TokenEvent]:
    """The events of new tokens of a sequence, and of how it ended (sampling.py) where it has."""
    request, finish = each.request, FINISH.get(how)
    if len(request.stop_ids) > STOP_IDS:  # more than the device knows
        stop = next((i for i, token in enumerate(tokens) if token in request.stop_ids), None)
        if stop is not None:
            tokens, logprobs, finish = tokens[:stop], logprobs[:stop], "stop"
    each.new += tokens
    id, new = request.id, tuple.__new__  # TokenEvent's own, in Python, takes as long again
    of_each: Iterable[float | None] = logprobs if request.logprobs else repeat(None)
    events = [
        new(TokenEvent, (id, token, logprob, None, None, ()))
        for token, logprob in zip(tokens, of_each, strict=False)
    ]
    if how == sampling.NOT_FINITE:
        error = not_finite(each.position, str(dtype).removeprefix("torch."))
        events.append(TokenEvent(request.id, None, None, "error", error))
    elif finish == "length":
        events[-1] = events[-1]._replace(finish=finish)
    elif finish is not None:
        events.append(TokenEvent(request.id, None, None, finish))
    return events


T = TypeVar("T", bound=Growing)


def in_turn(joining: deque[T], others: bool, seconds: float) -> Iterator[T]:
    """Read the prompts of requests, those together that one forward can read, and yield each that
    is read, and is no longer in `joining`.

    While any grows, it ends with the first chunk that is not a prompt's last; while `others` do, it
    ends after MAX_SECONDS, too. While none grows, a prompt is read for `seconds`. The next call
    goes on with the prompts whose turn it was not."""
    start, grows = time.perf_counter(), others
    turns = len(joining)
    while turns > 0:
        group = [joining.popleft()]
        first = group[0].reading
        while joining and first.reads_with(joining[0].reading, len(group) + 1):
            group.append(joining.popleft())
        turns -= len(group)
        read = first.step([each.reading for each in group[1:]])
        while not (read or grows) and time.perf_counter() - start < seconds:
            read = first.step()
        if not read:
            joining += group
            return
        grows = True
        yield from group
        if others and time.perf_counter() - start >= MAX_SECONDS:
            return


@contextmanager
def notice(log: Callable[[str], None]) -> Iterator[None]:
    """Say that kernels are compiled where it takes long."""
    line = "compiling the kernels that generate; they are kept for the next time"
    timer = threading.Timer(SILENT_SECONDS, log, [line])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
