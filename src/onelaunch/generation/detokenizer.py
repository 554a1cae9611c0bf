"""Detokenize one completion: ids to text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.generation.stops import StopStrings


class Detokenizer:
    """Turns the new tokens of a sequence into text.

    `prompt_ids` are the tokens before: a leading space is that of a continuation. Text that may be
    the beginning of one of the strings `stop` is held back until that is decided, and so is part
    of a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Iterable[int], stop: Sequence[str] = ()
    ) -> None:
        self._stream = tokenizer.decoder()
        self._stops = StopStrings(stop)
        for token in prompt_ids:
            self._stream.push(token)

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token; returns the text to pass on, and whether a stop string was reached."""
        return self._stops.push(self._stream.push(token))

    def finish(self) -> tuple[str, bool]:
        """After the last token: the text that was held back, and whether it has a stop string."""
        rest, stopped = self._stops.push(self._stream.finish())
        return (rest, True) if stopped else (rest + self._stops.finish(), False)
