"""A job under way: its sequences' events as pieces of text, in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from onelaunch.engines.engine import Request, TokenEvent
from onelaunch.errors import RunFailed
from onelaunch.generation.detokenizer import Detokenizer
from onelaunch.generation.prompts import Prompt
from onelaunch.generation.server.batcher import Batcher, Events, Ticket
from onelaunch.generation.server.body import InvalidRequest
from onelaunch.generation.server.requests import Job
from onelaunch.generation.server.service import Service


class Piece(NamedTuple):
    """What an event adds to a choice. token: the new one, if any, with its log-probability and the
    likeliest ones', where they were requested. text: what it adds, "" while part of it is held
    back."""

    text: str
    token: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass
class Choice:
    """A completion of one of the prompts.

    stop_type: why it ended: "eos" (a stop id), "word" (a stop string), "limit", or "" while it
    grows. first_token, seconds: seconds from the start to its first and last token.
    """

    index: int
    prompt: Prompt
    pieces: list[Piece] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stop_type: str = ""
    first_token: float = 0.0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """What has been sent of it, or would have been."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's: "stop", "length" or None."""
        if not self.stop_type:
            return None
        return "length" if self.stop_type == "limit" else "stop"


class RunningJob:
    """Runs a job on a batcher. `updates` gives what comes; when it ends, by its end or by an
    exception, no sequence of the job is left."""

    def __init__(self, service: Service, batcher: Batcher, job: Job) -> None:
        self.job, self._service, self._batcher = job, service, batcher
        self.choices = [
            Choice(i * job.n + k, prompt) for i, prompt in enumerate(job.prompts)
            for k in range(job.n)
        ]  # fmt: skip
        self._detokenizers = [
            Detokenizer(service.tokenizer, choice.prompt.ids, job.stop) for choice in self.choices
        ]
        self._start = time.perf_counter()

    async def updates(self) -> AsyncIterator[list[tuple[Choice, Piece]]]:
        """The new pieces, as they come. Raises RunFailed where the engine fails, InvalidRequest
        (504) after the server's time limit."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[int, Events]] = asyncio.Queue()

        def deliver_to(index: int, events: Events) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, (index, events))
            except RuntimeError:  # the loop is closed, and the job with it
                pass

        job, tickets = self.job, {}
        requests = []
        for choice in self.choices:
            request = Request(
                0, choice.prompt.ids, job.max_new_tokens, job.sampling, job.stop_ids,
                choice.index % job.n, job.logprobs, job.top_logprobs,
            )  # fmt: skip
            requests.append((request, lambda events, i=choice.index: deliver_to(i, events)))
        tickets = dict(enumerate(self._batcher.submit(requests)))
        deadline = loop.time() + self._service.limits.timeout_seconds
        try:
            while tickets:
                async with asyncio.timeout_at(deadline):
                    batch = [await inbox.get()]
                while not inbox.empty():
                    batch.append(inbox.get_nowait())
                pieces = []
                for index, events in batch:
                    if index in tickets:
                        pieces += self._apply(index, events, tickets)
                yield pieces
        except TimeoutError:
            seconds = self._service.limits.timeout_seconds
            raise InvalidRequest(
                f"not done after {seconds:g} s", status=504, kind="timeout_error"
            ) from None
        finally:
            self._batcher.cancel(tickets.values())

    def _apply(
        self, index: int, events: Events, tickets: dict[int, Ticket]
    ) -> list[tuple[Choice, Piece]]:
        """Add events to a choice. One that has ended is no longer among the tickets."""
        choice, seconds = self.choices[index], time.perf_counter() - self._start
        pieces = []
        for event in events:
            if event.error is not None:
                raise RunFailed(str(event.error)) from event.error
            piece, stop_type = self._piece(index, event)
            if event.token is not None:
                choice.first_token = choice.first_token or seconds
                choice.seconds = seconds
                choice.tokens.append(event.token)
            choice.pieces.append(piece)
            pieces.append((choice, piece))
            if stop_type:
                choice.stop_type = stop_type
                ticket = tickets.pop(index)
                if event.finish is None:
                    self._batcher.cancel([ticket])
                break
        return pieces

    def _piece(self, index: int, event: TokenEvent) -> tuple[Piece, str]:
        """An event's piece, and how the choice ended, if it did."""
        detokenizer, text, stopped = self._detokenizers[index], "", False
        if event.token is not None:
            text, stopped = detokenizer.push(event.token)
        if event.finish is not None and not stopped:
            rest, stopped = detokenizer.finish()
            text += rest
        stop_type = "word" if stopped else ""
        if not stop_type and event.finish is not None:
            stop_type = "eos" if event.finish == "stop" else "limit"
        return Piece(text, event.token, event.logprob, event.top), stop_type
