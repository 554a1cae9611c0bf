"""Stop strings, matched while text is streamed."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Add text; returns the text to pass on, and whether a stop string was reached."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        matches = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def finish(self) -> str:
        """Return the text held back, when no more follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
