"""What a person sees while training: drawn by its own thread, at most four times a second.

The training thread only leaves values behind. A terminal that takes its time, or stands still,
delays this thread and nothing else: frames are skipped, never queued.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from onelaunch.training.clock import PARTS

DRAWS_PER_SECOND = 4
PLAIN_SECONDS = 5.0
NOTICES = 256
HISTORY = 4096


@dataclass(frozen=True)
class Header:
    """What does not change during a run."""

    title: str
    lines: tuple[str, ...]
    updates: int
    accum: int
    tokens_per_micro_step: int


class Display:
    """Shows progress on standard error (or another open `descriptor`): a live panel on a terminal,
    plain lines elsewhere. `done` is (updates, micro-steps) of earlier processes."""

    def __init__(
        self, header: Header, done: tuple[int, int] = (0, 0), descriptor: int | None = None
    ) -> None:
        self.header = header
        self.dropped = 0
        self._progress = done
        self._start = (time.perf_counter(), done[0] * header.accum + done[1])
        self._record: dict[str, Any] | None = None
        self._val_loss: float | None = None
        self._seconds = dict.fromkeys((*PARTS, "wall"), 0.0)
        # appended by the training thread, taken by this one; old ones fall out, nobody waits
        self._notices: deque[str] = deque(maxlen=NOTICES)
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._speed: deque[tuple[float, int]] = deque(maxlen=20 * DRAWS_PER_SECOND)
        self._closing = threading.Event()
        # A raw descriptor of our own: a thread stuck in it holds no lock that Python's exit needs.
        self._terminal = _Terminal(sys.stderr.fileno() if descriptor is None else descriptor)
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    def progress(self, update: int, micro: int) -> None:
        """Tell how far the run is."""
        self._progress = (update, micro)

    def push(self, record: dict[str, Any]) -> None:
        """Show a telemetry record."""
        if record["kind"] == "update":
            self._record = record
            self._losses.append(record["loss"])
            for part in self._seconds:
                self._seconds[part] += record["seconds"][part]
        elif record["kind"] == "eval":
            self._val_loss = record["loss"]

    def notice(self, text: str) -> None:
        """A line that stays on the screen."""
        if len(self._notices) == NOTICES:
            self.dropped += 1
        self._notices.append(text)

    def close(self, seconds: float = 2.0) -> None:
        """Draw the last state and end; gives up on a terminal that does not take it."""
        self._closing.set()
        self._thread.join(seconds)

    # ---- this thread's side

    def _run(self) -> None:
        try:
            if self._terminal.isatty():
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
            self._note_speed()
            due = time.monotonic() >= next_line and self._progress != shown
            while self._notices:
                self._terminal.write(self._notices.popleft() + "\n")
            if due or (closing and self._record is not None and self._progress != shown):
                shown = self._progress
                next_line = time.monotonic() + PLAIN_SECONDS
                self._terminal.write(self.status_line() + "\n")
            if closing:
                return

    def _run_live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._terminal, force_terminal=True, legacy_windows=False)  # type: ignore[arg-type]
        with Live(
            console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            closing, drawn = False, ""
            while not closing:
                closing = self._closing.wait(1.0 / DRAWS_PER_SECOND)
                self._note_speed()
                while self._notices:
                    live.console.print(self._notices.popleft(), highlight=False, markup=False)
                panel = self._panel(console.width)
                if panel.plain != drawn:
                    drawn = panel.plain
                    live.update(panel, refresh=True)

    def _note_speed(self) -> None:
        update, micro = self._progress
        self._speed.append((time.perf_counter(), update * self.header.accum + micro))

    def micro_steps_per_second(self) -> float:
        """Over the last seconds; 0 before anything was measured."""
        if len(self._speed) < 2:
            return 0.0
        (t0, n0), (t1, n1) = self._speed[0], self._speed[-1]
        if n1 == n0:  # long micro-steps: look back over the whole run
            t0, n0 = self._start
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def status(self) -> list[tuple[str, str]]:
        """Names and values, the same in both forms."""
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
        if rate:
            left = (header.updates - update) * header.accum - micro
            rows += [
                ("micro-steps/s", f"{rate:.4g}"),
                ("updates/s", f"{rate / header.accum:.4g}"),
                ("tokens/s", f"{rate * header.tokens_per_micro_step:,.0f}"),
                ("left", _duration(left / rate)),
            ]
        return rows

    def status_line(self) -> str:
        """The state as one line."""
        return " | ".join(f"{name} {value}" for name, value in self.status())

    def parts_line(self) -> str:
        """Where the time has gone so far, in per cent of the wall time."""
        wall = self._seconds["wall"]
        if not wall:
            return ""
        shares = ((part, self._seconds[part] / wall) for part in PARTS)
        return "  ".join(f"{part} {share:.1%}" for part, share in shares if share >= 0.002)

    def _panel(self, width: int) -> Any:
        from rich.text import Text

        width = max(20, min(width, 100) - 1)
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(self.header.title + "\n", "bold")
        for line in self.header.lines:
            text.append(line + "\n", "dim")
        update, micro = self._progress
        share = (update + micro / self.header.accum) / self.header.updates
        filled = round((width - 8) * min(1.0, share))
        text.append("#" * filled, "green").append("." * (width - 8 - filled), "dim")
        text.append(f" {share:6.1%}\n")
        rows = self.status()
        for i, (name, value) in enumerate(rows):
            text.append(name + " ", "dim").append(value)
            text.append("\n" if i + 1 == len(rows) or i % 5 == 4 else "   ")
        if self._losses:
            text.append("loss ", "dim").append(sparkline(list(self._losses), width - 5) + "\n")
        text.append("time ", "dim").append(self.parts_line())
        return text


class _Terminal:
    """The little of a text file that rich needs, on a descriptor written without buffering."""

    encoding = "utf-8"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "replace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            pass  # the terminal went away; training goes on
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def sparkline(values: list[float], width: int) -> str:
    """A row of at most `width` block characters from low to high, each the mean of its share."""
    blocks = "".join(chr(0x2581 + i) for i in range(8))
    n = max(1, min(width, len(values)))
    edges = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
