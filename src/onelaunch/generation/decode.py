"""Decode prompts on any engine: requests, detokenized text, stop strings, timing."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.engines.checks import (
    check_max_new_tokens,
    check_prompts,
    check_sampling,
    check_top_logprobs,
)
from onelaunch.engines.engine import (
    STEP_SECONDS,
    Engine,
    Finish,
    Request,
    Sampling,
    Session,
    TokenEvent,
)
from onelaunch.engines.sampling import sample_numbers
from onelaunch.errors import BadInput
from onelaunch.generation.detokenizer import Detokenizer
from onelaunch.generation.prompts import Prompt

UNSTREAMED_STEP_SECONDS = 0.2  # of a step whose text is not streamed


class TextEvent(NamedTuple):
    """A new token of a completion, its end, or both.

    prompt_index: the index of its prompt.
    token: the new token; None if the completion ends without one.
    text: the text that the token adds: "" inside a character of several tokens, or while it may be
        the beginning of a stop string.
    finish: why the completion ended, see `Finish`; None while it goes on.
    logprob, top: the token's log-probability, and the most likely tokens with theirs, where they
        were requested, see `TokenEvent`.
    """

    prompt_index: int
    token: int | None
    text: str
    finish: Finish | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """A prompt and its completion.

    ids: the new tokens, up to the one that completed a stop string.
    text: the new text, without the stop string; None until it has ended, and without a tokenizer.
    finish: why it ended; None until then.
    first_token_seconds, seconds: from the start of the `Decoding` to its first and last token.
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish: Finish | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Sampling and the ends of a completion: after `max_new_tokens`, at one of `stop_ids`, before
    one of the strings `stop`, or when the model's context is full; and whether its events have
    `logprob`, and how many tokens they have in `top`."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0


class Decoding:
    """An iterator of the `TextEvent`s of several prompts, as they are generated.

    `completions` has a `Completion` per prompt, which grows with the events. As many prompts are
    generated at once as the engine says (`max_batch`). `close` ends the generation early. The
    constructor raises BadInput for an empty prompt, one longer than the model's context, ids
    outside its vocabulary, or numbers out of range; `next` raises RunFailed if logits are not
    finite.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        limits: Limits,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_max_new_tokens(limits.max_new_tokens)
        if limits.stop and tokenizer is None:
            raise BadInput(
                f"stop={list(limits.stop)!r}: stop strings need a tokenizer; leave it out"
            )
        if "" in limits.stop:
            raise BadInput("stop='': must not be empty; leave it out")
        check_sampling(engine.config, limits.sampling)
        check_top_logprobs(limits.top_logprobs)
        check_prompts(engine.config, [prompt.ids for prompt in prompts])
        self._engine, self.limits = engine, limits
        self.completions = [Completion(prompt) for prompt in prompts]
        self._growing = [
            _Growing(completion, tokenizer, limits.stop) for completion in self.completions
        ]
        self._has_text = tokenizer is not None
        self._running = len(prompts)
        self._open: Session | None = None
        self._cancelled: set[int] = set()
        self._step_seconds = STEP_SECONDS
        self._steps = self._run()
        self._events = self._apply()
        self._looked = False  # at any event

    def __iter__(self) -> Iterator[TextEvent]:
        return self

    def __next__(self) -> TextEvent:
        self._looked = True
        return next(self._events)

    def finish(self) -> list[Completion]:
        """Generate until every completion has ended; returns them."""
        if not self.limits.stop:  # with stop strings, tokens after one would be wasted
            self._step_seconds = UNSTREAMED_STEP_SECONDS
        if self._has_text or self._looked:
            for _ in self._events:
                pass
        else:
            for events, seconds in self._steps:
                self._collect(events, seconds)
        return self.completions

    def cancel(self, index: int) -> None:
        """End one completion; the next events include its end."""
        self._cancelled.add(index)

    def close(self) -> None:
        """End all completions, without further events."""
        self._events.close()
        self._steps.close()

    def _run(self) -> Generator[tuple[list[TokenEvent], float], None, None]:
        """The events of each step, and the seconds since the first one began."""
        start = time.perf_counter()
        if not self._running:
            return
        with closing(self._session()) as session:
            self._open = session
            while self._running:
                for index in self._cancelled:
                    session.cancel(index)
                self._cancelled.clear()
                events = session.step(self._step_seconds)
                yield events, time.perf_counter() - start

    def _apply(self) -> Generator[TextEvent, None, None]:
        for events, seconds in self._steps:
            for event in events:
                growing = self._growing[event.id]
                if growing.completion.finish is not None:
                    continue  # tokens after a stop string
                if event.error is not None:
                    self._steps.close()
                    raise event.error
                text_event = growing.apply(event, seconds)
                if text_event.finish is not None:
                    self._running -= 1
                    if event.finish is None:
                        assert self._open is not None
                        self._open.cancel(event.id)
                yield text_event

    def _collect(self, events: list[TokenEvent], seconds: float) -> None:
        """Add a step's events to completions without text; many tokens take little time each."""
        for index, token, _, finish, error, _ in events:
            completion = self.completions[index]
            if error is not None:
                self._steps.close()
                raise error
            if token is not None:
                completion.ids.append(token)
                completion.seconds = seconds
                if completion.first_token_seconds is None:
                    completion.first_token_seconds = seconds
            if finish is not None:
                completion.finish = finish
                self._running -= 1

    def _session(self) -> Session:
        limits, prompts = self.limits, [each.prompt.ids for each in self.completions]
        longest = max(len(ids) for ids in prompts) + max(1, limits.max_new_tokens) - 1
        session = self._engine.session(min(len(prompts), self._engine.max_batch), longest)
        for index, (ids, sample) in enumerate(zip(prompts, sample_numbers(prompts), strict=True)):
            session.submit(
                Request(
                    index, ids, limits.max_new_tokens, limits.sampling, limits.stop_ids, sample,
                    limits.logprobs, limits.top_logprobs,
                )
            )  # fmt: skip
        return session


def generate_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Generate the new token ids of prompts that are token ids. Raises as `Decoding`."""
    limits = Limits(max_new_tokens, sampling or Sampling(), stop_ids)
    decoding = Decoding(engine, [Prompt("", ids) for ids in prompts], limits)
    return [completion.ids for completion in decoding.finish()]


def tokens_per_second(completions: Sequence[Completion]) -> float | None:
    """Return the generation speed, from the first new token of all completions to the last.

    The first token is not counted, as its time is that of reading the prompt. None if there are
    fewer than two.
    """
    started = [c for c in completions if c.first_token_seconds is not None]
    if not started:
        return None
    tokens = sum(len(completion.ids) for completion in started) - 1
    seconds = max(c.seconds for c in started) - min(c.first_token_seconds or 0.0 for c in started)
    return tokens / seconds if tokens and seconds > 0 else None


class _Growing:
    """A completion and what turns its tokens into text."""

    def __init__(
        self, completion: Completion, tokenizer: Tokenizer | None, stop: Sequence[str]
    ) -> None:
        self.completion = completion
        ids = completion.prompt.ids  # the new text continues the prompt
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, ids, stop)
        self._pieces: list[str] = []

    def apply(self, event: TokenEvent, seconds: float) -> TextEvent:
        """Add a token event of the session to the completion; returns its text event."""
        completion, finish, piece, stopped = self.completion, event.finish, "", False
        if event.token is not None:
            completion.ids.append(event.token)
            completion.seconds = seconds
            if completion.first_token_seconds is None:
                completion.first_token_seconds = seconds
        if self._detokenizer is not None:
            if event.token is not None:
                piece, stopped = self._detokenizer.push(event.token)
            if finish is not None and not stopped:
                rest, stopped = self._detokenizer.finish()
                piece += rest
            if stopped:
                finish = "stop"
            self._pieces.append(piece)
            if finish is not None:
                completion.text = "".join(self._pieces)
        completion.finish = finish
        return TextEvent(event.id, event.token, piece, finish, event.logprob, event.top)
