"""An unbuffered terminal, and a block of lines that is redrawn in place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"  # from the cursor on
CLIP, WRAP = "\x1b[?7l", "\x1b[?7h"  # for lines wider than the window
STYLES = {"bold": "\x1b[1m", "dim": "\x1b[2m", "green": "\x1b[32m"}
NO_STYLE = "\x1b[0m"
DEFAULT_SIZE = os.terminal_size((80, 24))


@dataclass(frozen=True)
class Line:
    """A line of pieces: (text, style name or "")."""

    pieces: tuple[tuple[str, str], ...]

    @property
    def plain(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def columns(self) -> int:
        """Width in columns: characters of Chinese, Japanese and Korean take two."""
        if self.plain.isascii():
            return len(self.plain)
        from rich.cells import cell_len

        return cell_len(self.plain)

    def styled(self) -> str:
        """Return the text with style codes; without colours if NO_COLOR is set."""
        return "".join(
            f"{STYLES[style]}{text}{NO_STYLE}"
            if style and not (style == "green" and os.environ.get("NO_COLOR"))
            else text
            for text, style in self.pieces
        )

    def joined(self, space: str, other: Line) -> Line:
        return Line((*self.pieces, (space, ""), *other.pieces))

    def broken(self, width: int) -> list[Line]:
        """Break the line to this width, between words if possible. Broken lines have the style of
        the first piece."""
        if self.columns <= width:
            return [self]
        from rich.console import Console
        from rich.text import Text

        lines = Text(self.plain).wrap(Console(width=width), width)
        return [Line(((line.plain, self.pieces[0][1]),)) for line in lines]


class Terminal:
    """Writes text to a duplicate of an open descriptor, in the encoding of the terminal."""

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        self.encoding = encoding
        self._descriptor = os.dup(descriptor)

    def write(self, text: str) -> None:
        """Write text. A closed terminal is not an error, so that training goes on."""
        data = text.encode(self.encoding, "replace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            pass

    def redraws(self) -> bool:
        """Return whether it is a terminal that can move its cursor."""
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        return os.isatty(self._descriptor) and not dumb

    def size(self) -> os.terminal_size:
        """Return the current columns and lines; 80x24 if unknown."""
        try:
            size = os.get_terminal_size(self._descriptor)
        except OSError:
            return DEFAULT_SIZE
        return size if size.columns and size.lines else DEFAULT_SIZE

    def close(self) -> None:
        os.close(self._descriptor)


class Block:
    """Lines at the bottom of a terminal, redrawn in place.

    The cursor stays at the beginning of the last line. When a window gets narrower, the terminal
    wraps the lines into more rows, so the way up is computed with the current columns. Lines are
    clipped, not wrapped, if the window is narrower than the system reports: otherwise each frame
    would leave rows behind.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._widths: list[int] = []

    def draw(self, lines: Sequence[Line], above: Iterable[str] = ()) -> None:
        """Replace the lines by these; `above` stays on the screen over them."""
        ends = [f"{CLEAR_LINE}\n"] * (len(lines) - 1) + [f"{CLEAR_BELOW}\r"]
        body = "".join(line.styled() + end for line, end in zip(lines, ends, strict=True))
        notices = "".join(f"{line}{CLEAR_LINE}\n" for line in above)
        # cleared line by line: tmux saves a copy of a screen that is cleared from its first row
        self._terminal.write(f"{self._to_the_first()}{notices}{CLIP}{body}{WRAP}")
        self._widths = [line.columns for line in lines]

    def close(self) -> None:
        """Leave the lines on the screen and the cursor below them."""
        if self._widths:
            self._terminal.write(f"\n{SHOW_CURSOR}")

    def _to_the_first(self) -> str:
        """Return the codes that move the cursor to the beginning of the block."""
        if not self._widths:
            return HIDE_CURSOR
        columns = self._terminal.size().columns
        up = sum(max(1, math.ceil(width / columns)) for width in self._widths[:-1])
        return "\r" + (f"\x1b[{up}A" if up else "")
