"""The progress display of training, drawn by its own thread at most four times per second.

The training thread only sets values. A slow or blocked terminal delays this thread only: frames are
skipped, not queued.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from onelaunch.training.clock import PARTS, REDUCE, STEP
from onelaunch.training.flops import TrainingFlops, format_rate
from onelaunch.training.terminal import Block, Line, Terminal

DRAWS_PER_SECOND = 4
PLAIN_SECONDS = 5.0
NOTICES = 256
HISTORY = 4096
MAX_WIDTH = 99
FIELDS_PER_LINE = 6
BLOCKS = "".join(chr(0x2581 + i) for i in range(8))
ASCII_BLOCKS = "_.-=+*#@"


@dataclass(frozen=True)
class Header:
    """The constant part of the display of a run."""

    title: str
    lines: tuple[str, ...]
    updates: int
    accum: int
    tokens_per_micro_step: int
    flops: TrainingFlops


class Display:
    """Shows progress on standard error (or another open `descriptor`): a live panel on a terminal,
    else plain lines. `done` is (updates, micro-steps) of earlier processes of the run."""

    def __init__(
        self, header: Header, done: tuple[int, int] = (0, 0), descriptor: int | None = None
    ) -> None:
        self.header = header
        self.dropped = 0
        self._progress = done
        self._start = (time.perf_counter(), done[0] * header.accum + done[1])
        self._record: dict[str, Any] | None = None
        self._val_loss: float | None = None
        self._seconds = dict.fromkeys((*PARTS, STEP, REDUCE, "wall"), 0.0)
        # appended by the training thread, removed by this one; the oldest are dropped
        self._notices: deque[Line] = deque(maxlen=NOTICES)
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._speed: deque[tuple[float, int]] = deque(maxlen=20 * DRAWS_PER_SECOND)
        self._header: list[Line] = []
        self._header_width = 0
        self._closing = threading.Event()
        # A raw descriptor: a thread blocked in it holds no lock that Python's exit needs.
        self._terminal = Terminal(
            sys.stderr.fileno() if descriptor is None else descriptor,
            (sys.stderr.encoding if descriptor is None else None) or "utf-8",
        )
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def progress(self, update: int, micro: int) -> None:
        """Set the progress."""
        self._progress = (update, micro)

    def push(self, record: dict[str, Any]) -> None:
        """Show a telemetry record."""
        if record["kind"] == "update":
            self._record = record
            self._losses.append(record["loss"])
            for part in self._seconds:
                self._seconds[part] += record["seconds"].get(part, 0.0)
        elif record["kind"] == "eval":
            self._val_loss = record["loss"]
        elif record["kind"] == "sample":
            text = _printable(f"{record['prompt']}{record['text']}")
            self._add(Line(((f"sample: {text}", "dim"),)))

    def notice(self, text: str) -> None:
        """Show a line that stays on the screen."""
        self._add(Line(((text, ""),)))

    def _add(self, line: Line) -> None:
        if len(self._notices) == NOTICES:
            self.dropped += 1
        self._notices.append(line)

    def close(self, seconds: float = 2.0) -> None:
        """Draw the last state and end; gives up on a blocked terminal after `seconds`."""
        self._closing.set()
        self._thread.join(seconds)

    # ---- the display thread

    def _run(self) -> None:
        try:
            if self._terminal.redraws():
                self._run_live()
            else:
                self._run_plain()
        finally:
            self._terminal.close()

    def _run_plain(self) -> None:
        self._terminal.write("\n".join([self.header.title, *self.header.lines]) + "\n")
        shown = None
        next_line = time.monotonic() + PLAIN_SECONDS
        while True:
            closing = self._closing.wait(1.0 / DRAWS_PER_SECOND)
            self._sample_speed()
            due = time.monotonic() >= next_line and self._progress != shown
            while self._notices:
                self._terminal.write(self._notices.popleft().plain + "\n")
            if due or (closing and self._record is not None and self._progress != shown):
                shown = self._progress
                next_line = time.monotonic() + PLAIN_SECONDS
                self._terminal.write(self.status_line() + "\n")
            if closing:
                return

    def _run_live(self) -> None:
        block = Block(self._terminal)
        try:
            closing, drawn = False, None
            while not closing:
                closing = self._closing.wait(1.0 / DRAWS_PER_SECOND)
                self._sample_speed()
                notices = []
                while self._notices:
                    notices.append(self._notices.popleft().styled())
                size = self._terminal.size()
                lines = self.panel(size.columns, size.lines)
                shown = size, [line.plain for line in lines]
                if notices or shown != drawn:
                    drawn = shown
                    block.draw(lines, notices)
        finally:
            block.close()

    def _sample_speed(self) -> None:
        update, micro = self._progress
        self._speed.append((time.perf_counter(), update * self.header.accum + micro))

    def micro_steps_per_second(self) -> float:
        """Return the rate over the last seconds; 0 before any measurement."""
        if len(self._speed) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._speed[0], self._speed[-1]
        if n1 == n0:  # long micro-steps: look back over the whole run
            t0, n0 = self._start
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def status(self) -> list[tuple[str, str]]:
        """Return names and values, the same for panel and lines."""
        header, record = self.header, self._record
        update, micro = self._progress
        rate = self.micro_steps_per_second()
        rows = [("update", f"{update}/{header.updates}")]
        if header.accum > 1:
            rows.append(("micro-step", f"{micro}/{header.accum}"))
        if record is not None:
            rows.append(("loss", f"{record['loss']:.4f}"))
        if self._val_loss is not None:
            rows.append(("val", f"{self._val_loss:.4f}"))
        if record is not None:
            rows.append(("lr", f"{record['lr']:.2e}"))
            rows.append(("grad norm", f"{record['grad_norm']:.3g}"))
        if rate:
            tokens = rate * header.tokens_per_micro_step
            flops = tokens * header.flops.per_token
            peak = header.flops.peak
            left = (header.updates - update) * header.accum - micro
            rows += [
                ("micro-steps/s", f"{rate:.4g}"),
                ("updates/s", f"{rate / header.accum:.4g}"),
                ("tokens/s", f"{tokens:,.0f}"),
                ("MFU", f"{flops / peak:.1%}") if peak else ("compute", format_rate(flops)),
                ("left", format_duration(left / rate)),
            ]
        return rows

    def status_line(self) -> str:
        """Return the status as one line."""
        return " | ".join(f"{name} {value}" for name, value in self.status())

    def parts(self) -> list[str]:
        """Return the parts of the wall time so far, in percent."""
        wall = self._seconds["wall"]
        if not wall:
            return []
        shares = ((part, self._seconds[part] / wall) for part in (*PARTS, STEP, REDUCE))
        return [f"{part} {share:.1%}" for part, share in shares if share >= 0.002]

    def panel(self, columns: int, rows: int) -> list[Line]:
        """Lay out the panel for a window of this size. If it has too few rows, the header is cut
        first."""
        # some terminals wrap a line that reaches the last column
        width = max(1, min(columns - 1, MAX_WIDTH))
        if width != self._header_width:
            self._header_width = width
            self._header = Line(((self.header.title, "bold"),)).broken(width)
            for text in self.header.lines:
                self._header += Line(((text, "dim"),)).broken(width)
        fields = [Line(((f"{name} ", "dim"), (value, ""))) for name, value in self.status()]
        lines = [self._bar(width), *_flow(fields, width, "   ", FIELDS_PER_LINE)]
        if self._losses:
            blocks = BLOCKS if _encodes(BLOCKS, self._terminal.encoding) else ASCII_BLOCKS
            curve = sparkline(list(self._losses), max(1, width - 5), blocks)
            lines += Line((("loss ", "dim"), (curve, ""))).broken(width)
        if parts := self.parts():
            first = Line((("time ", "dim"), (parts[0], "")))
            others = [Line(((part, ""),)) for part in parts[1:]]
            lines += _flow([first, *others], width, "  ")
        room = max(1, rows - 1)
        return [*self._header[: max(0, room - len(lines))], *lines[:room]]

    def _bar(self, width: int) -> Line:
        update, micro = self._progress
        share = min(1.0, (update + micro / self.header.accum) / self.header.updates)
        length = width - 8
        if length < 1:
            return Line(((f"{share:.1%}"[:width], ""),))
        filled = round(length * share)
        rest = "." * (length - filled)
        return Line((("#" * filled, "green"), (rest, "dim"), (f" {share:6.1%}", "")))


def _flow(fields: list[Line], width: int, space: str, per_line: int | None = None) -> list[Line]:
    """Arrange fields in as few lines as possible; a field is broken only if it exceeds a line."""
    lines: list[Line] = []
    n_fields = 0
    for field in fields:
        fits = bool(lines) and lines[-1].columns + len(space) + field.columns <= width
        if fits and n_fields != per_line:
            lines[-1] = lines[-1].joined(space, field)
            n_fields += 1
        else:
            lines += field.broken(width)
            n_fields = 1
    return lines


def _printable(text: str) -> str:
    """Put a text in one line: white space is one space, control characters are question marks."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _encodes(characters: str, encoding: str) -> bool:
    try:
        characters.encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def sparkline(values: list[float], width: int, blocks: str = BLOCKS) -> str:
    """Plot values as a row of at most `width` block characters, each the mean of its share."""
    n = max(1, min(width, len(values)))
    edges = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def format_duration(seconds: float) -> str:
    """Format a time, as in "1:02:03" or "2:03"."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
