"""From prompts to events, on any engine: requests, text, stop strings, tokens and seconds."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.engines.checks import check_max_new_tokens, check_prompts
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
from onelaunch.generation.prompts import Prompt
from onelaunch.generation.stops import StopStrings

MAX_BATCH = 16  # sequences that grow at once
UNWATCHED_SECONDS = 0.2  # of a step whose text nobody waits for


class TextEvent(NamedTuple):
    """A new token of a text, its end, or both.

    prompt_index: the prompt's.
    token: the new token; None where the text ends without one.
    text: what the token adds to the text: "" amid a character of several tokens, or while it may
        be the beginning of a stop string.
    finish: why the text ended, see `Finish`; None where it goes on.
    """

    prompt_index: int
    token: int | None
    text: str
    finish: Finish | None


@dataclass(slots=True)
class Completion:
    """A prompt and its continuation.

    text: None until it has ended, and without a tokenizer. It ends before a stop string; `ids` are
        the tokens up to the one that completed it.
    finish: why it ended; None until then.
    Seconds run from the beginning of all texts: to the first new token, and to the last.
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish: Finish | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How a text goes on and where it ends: after `max_new_tokens`, at one of `stop_ids`, before
    one of the strings `stop`, or where the model's context is full."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()


class Decoding:
    """The continuations of some prompts, as they come: an iterator of `TextEvent`.

    `completions` has a `Completion` for each prompt, which grows with the events. Up to MAX_BATCH
    prompts grow at once. Ending the iteration early, with `close`, ends the generation. Raises
    BadInput at once for an empty prompt, one beyond the model's context, or ids beyond its
    vocabulary; `next` raises RunFailed where logits are not finite.
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
            raise BadInput(f"stop={list(limits.stop)!r}: strings need a tokenizer; leave it out")
        if "" in limits.stop:
            raise BadInput("stop='': must not be empty; leave it out")
        check_prompts(engine.config, [prompt.ids for prompt in prompts])
        self._engine, self.limits = engine, limits
        self.completions = [Completion(prompt) for prompt in prompts]
        self._texts = [_Text(completion, tokenizer, limits.stop) for completion in self.completions]
        self._cancelled: set[int] = set()
        self._step_seconds = STEP_SECONDS
        self._events = self._run()

    def __iter__(self) -> Iterator[TextEvent]:
        return self

    def __next__(self) -> TextEvent:
        return next(self._events)

    def finish(self) -> list[Completion]:
        """Go on to the end of all texts."""
        if not self.limits.stop:  # else tokens behind a stop string would be computed for nothing
            self._step_seconds = UNWATCHED_SECONDS
        for _ in self._events:
            pass
        return self.completions

    def cancel(self, index: int) -> None:
        """End one text; its end comes among the next events."""
        self._cancelled.add(index)

    def close(self) -> None:
        """End all texts, without further events."""
        self._events.close()

    def _run(self) -> Generator[TextEvent, None, None]:
        start = time.perf_counter()
        going = len(self._texts)
        if not going:
            return
        with closing(self._session()) as session:
            while going:
                for index in self._cancelled:
                    session.cancel(index)
                self._cancelled.clear()
                events = session.step(self._step_seconds)
                seconds = time.perf_counter() - start
                for event in events:
                    text = self._texts[event.id]
                    if text.completion.finish is not None:
                        continue  # tokens behind a stop string
                    if event.error is not None:
                        raise event.error
                    yielded = text.take(event, seconds)
                    if yielded.finish is not None:
                        going -= 1
                        if event.finish is None:
                            session.cancel(event.id)
                    yield yielded

    def _session(self) -> Session:
        limits, prompts = self.limits, [each.prompt.ids for each in self.completions]
        longest = max(len(ids) for ids in prompts) + max(1, limits.max_new_tokens) - 1
        session = self._engine.session(min(len(prompts), MAX_BATCH), longest)
        for index, (ids, sample) in enumerate(zip(prompts, sample_numbers(prompts), strict=True)):
            session.submit(
                Request(index, ids, limits.max_new_tokens, limits.sampling, limits.stop_ids, sample)
            )
        return session


def generate_ids(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new token ids of each prompt, which is given as token ids. Raises as `Decoding`."""
    limits = Limits(max_new_tokens, sampling or Sampling(), stop_ids)
    decoding = Decoding(engine, [Prompt("", ids) for ids in prompts], limits)
    return [completion.ids for completion in decoding.finish()]


def tokens_per_second(completions: Sequence[Completion]) -> float | None:
    """New tokens of all texts per second, from the first of them to the last.

    The first, which reads a prompt, is left out. None where there are not two.
    """
    begun = [c for c in completions if c.first_token_seconds is not None]
    if not begun:
        return None
    tokens = sum(len(completion.ids) for completion in begun) - 1
    seconds = max(c.seconds for c in begun) - min(c.first_token_seconds or 0.0 for c in begun)
    return tokens / seconds if tokens and seconds > 0 else None


class _Text:
    """Detokenizes one continuation, up to its stop string, into its completion."""

    def __init__(
        self, completion: Completion, tokenizer: Tokenizer | None, stop: Sequence[str]
    ) -> None:
        self.completion = completion
        self._stream = None if tokenizer is None else tokenizer.decoder()
        self._stops = StopStrings(stop)
        self._pieces: list[str] = []
        if self._stream is not None:
            for token in completion.prompt.ids:  # it is no longer at a text's beginning
                self._stream.push(token)

    def take(self, event: TokenEvent, seconds: float) -> TextEvent:
        """What a session's event adds."""
        completion, finish, piece, found = self.completion, event.finish, "", False
        if event.token is not None:
            completion.ids.append(event.token)
            completion.seconds = seconds
            if completion.first_token_seconds is None:
                completion.first_token_seconds = seconds
        if self._stream is not None:
            if event.token is not None:
                piece, found = self._stops.push(self._stream.push(event.token))
            if finish is not None and not found:
                rest, found = self._stops.push(self._stream.finish())
                piece += rest if found else rest + self._stops.finish()
            if found:
                finish = "stop"
            self._pieces.append(piece)
            if finish is not None:
                completion.text = "".join(self._pieces)
        completion.finish = finish
        return TextEvent(event.id, event.token, piece, finish)
