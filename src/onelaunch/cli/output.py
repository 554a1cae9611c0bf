"""The output of `generate`: texts as they come, one JSON object, a summary."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onelaunch.cli.common import log

if TYPE_CHECKING:
    from onelaunch.api import LanguageModel
    from onelaunch.generation.decode import Completion, Decoding, TextEvent
    from onelaunch.generation.prompts import Prompt


class Output:
    """Standard output: texts one after another, a blank line between them, flushed as they come.

    Texts may grow together: what comes for a later one waits until those before it are complete.
    """

    def __init__(self, echo: bool, ids: bool, quiet: bool) -> None:
        self._echo, self._ids, self._quiet = echo, ids, quiet
        self._held: list[str] = []
        self._prompts: list[Prompt] = []
        self._begun = 0
        self._space = ""

    def write(self, decoding: Decoding) -> None:
        """Write the texts as they come. On a terminal the line of one that is broken off is ended:
        what follows is no part of it."""
        self._prompts = [completion.prompt for completion in decoding.completions]
        waiting: list[list[TextEvent]] = [[] for _ in self._prompts]
        ended = [False] * len(waiting)
        current = 0
        try:
            for event in decoding:
                waiting[event.prompt_index].append(event)
                ended[event.prompt_index] = event.finish is not None
                while current < len(waiting):
                    for each in waiting[current]:
                        self._write(each)
                    waiting[current].clear()
                    if not ended[current]:
                        break
                    current += 1
                sys.stdout.flush()
        except BaseException:
            with contextlib.suppress(OSError):
                if self._begun and sys.stdout.isatty():
                    sys.stdout.write("\n")
                    sys.stdout.flush()
            raise
        self._begin(len(self._prompts) - 1)
        sys.stdout.write("\n")
        sys.stdout.flush()
        for line in self._held:
            log(line, self._quiet)

    def _write(self, event: TextEvent) -> None:
        if event.token is None and not event.text:
            return  # nothing is written before the first token
        self._begin(event.prompt_index)
        if not self._ids:
            sys.stdout.write(event.text)
        elif event.token is not None:
            self._write_id(event.token)

    def notice(self, line: str) -> None:
        """A line for standard error; not amid a text on the same terminal."""
        if self._begun and sys.stderr.isatty() and sys.stdout.isatty():
            self._held.append(line)
        else:
            log(line, self._quiet)

    def _begin(self, index: int) -> None:
        while self._begun <= index:
            if self._begun:
                sys.stdout.write("\n\n")
            prompt = self._prompts[self._begun]
            self._begun += 1
            self._space = ""
            if self._echo and self._ids:
                for token in prompt.ids[prompt.special :]:
                    self._write_id(token)
            elif self._echo:
                sys.stdout.write(prompt.text)

    def _write_id(self, token: int) -> None:
        sys.stdout.write(f"{self._space}{token}")
        self._space = " "


def as_json(name: str, model: LanguageModel, decoding: Decoding) -> str:
    """The finished texts as one JSON object."""
    from onelaunch.generation.decode import tokens_per_second

    def entry(completion: Completion) -> dict[str, Any]:
        return {
            "prompt": completion.prompt.text,
            "prompt_ids": completion.prompt.ids,
            "text": completion.text,
            "ids": completion.ids,
            "finish": completion.finish,
            "first_token_seconds": completion.first_token_seconds,
            "seconds": completion.seconds,
        }

    limits = decoding.limits
    return json.dumps(
        {
            "model": name,
            "engine": model.describe(),
            "sampling": asdict(limits.sampling) | {"max_new_tokens": limits.max_new_tokens},
            "texts": [entry(completion) for completion in decoding.completions],
            "tokens_per_second": tokens_per_second(decoding.completions),
        }
    )


def summary(model: LanguageModel, decoding: Decoding) -> str:
    """Tokens and speed, and why a text is shorter than requested where the context is."""
    from onelaunch.generation.decode import tokens_per_second

    about, limits, completions = model.describe(), decoding.limits, decoding.completions
    new = sum(len(completion.ids) for completion in completions)
    read = sum(len(completion.prompt.ids) for completion in completions)
    parts = [f"{new} new token{'s' * (new != 1)}"]
    rate = tokens_per_second(completions)
    if rate is not None:
        parts[0] += f" at {rate:.1f} tokens/s"
    first = completions[0].first_token_seconds
    if first is not None:
        parts.append(f"the first after {first * 1000:.1f} ms")
    parts.append(f"{read} prompt token{'s' * (read != 1)}")
    wrote = about.get("generates_with", about["engine"])
    parts.append(f"{wrote} engine on {about['device']} in {about['dtype']}")
    if not limits.sampling.greedy:
        parts.append(f"seed {limits.sampling.seed}")
    cut_off = (c for c in completions if c.finish == "length")
    if any(len(completion.ids) < limits.max_new_tokens for completion in cut_off):
        parts.append(f"ended by the model's context of {model.config.max_seq_len} tokens")
    return "; ".join(parts)
