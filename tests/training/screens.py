"""A terminal in a few lines: what is on its screen after what was written to it, and after its
window was made narrower or wider, which breaks and joins lines as most terminals do today."""

import re

_PIECES = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])", re.DOTALL)


class Screen:
    """Rows as (text, whether the next row goes on with it), and the cursor."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.clips = False
        self.cursor_shown = True
        self._rows: list[tuple[str, bool]] = [("", False)]
        self._row = self._column = 0

    def text(self) -> list[str]:
        """Its rows, without the spaces at their ends."""
        return [row.rstrip() for row, _ in self._rows]

    def write(self, text: str) -> None:
        end = 0
        for piece in _PIECES.finditer(text):
            assert piece.start() == end, f"not known here: {text[end : end + 8]!r}"
            end = piece.end()
            parameter, command, move, character = piece.groups()
            if command:
                self._obey(parameter, command)
            elif move == "\r":
                self._column = 0
            elif move == "\n":
                self._next_row()
                self._column = 0
            else:
                self._put(character)
        assert end == len(text)

    def resize(self, columns: int) -> None:
        """Break all lines anew; the cursor stays on the character where it is."""
        lines: list[str] = []
        going_on = False
        for number, (row, goes_on) in enumerate(self._rows):
            if number == self._row:
                at = len(lines[-1]) if going_on else 0
                cursor_line, cursor_at = len(lines) - going_on, at + self._column
            lines = [*lines[:-1], lines[-1] + row] if going_on else [*lines, row]
            going_on = goes_on
        self.columns, self._rows = columns, []
        for number, line in enumerate(lines):
            if number == cursor_line:
                self._row = len(self._rows) + cursor_at // columns
                self._column = cursor_at % columns
            pieces = [line[i : i + columns] for i in range(0, max(1, len(line)), columns)]
            self._rows += [(piece, i + 1 < len(pieces)) for i, piece in enumerate(pieces)]

    def _put(self, character: str) -> None:
        if self._column == self.columns:
            if self.clips:
                self._column -= 1
            else:
                self._rows[self._row] = (self._rows[self._row][0], True)
                self._next_row()
                self._column = 0
        row, goes_on = self._rows[self._row]
        row = row.ljust(self._column)
        self._rows[self._row] = (
            row[: self._column] + character + row[self._column + 1 :],
            goes_on,
        )
        self._column += 1

    def _next_row(self) -> None:
        self._row += 1
        if self._row == len(self._rows):
            self._rows.append(("", False))

    def _obey(self, parameter: str, command: str) -> None:
        if command == "A":
            self._row = max(0, self._row - int(parameter or 1))
        elif command in "KJ":
            row, _ = self._rows[self._row]
            self._rows[self._row] = (row[: self._column], False)
            if command == "J":
                del self._rows[self._row + 1 :]
        elif parameter == "?7":
            self.clips = command == "l"
        elif parameter == "?25":
            self.cursor_shown = command == "h"
        else:
            assert command == "m", f"not known here: {parameter}{command}"
