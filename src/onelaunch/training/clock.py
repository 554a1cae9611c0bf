"""Measure the parts of the wall time of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import torch

PARTS = ("data", "forward", "backward", "optimizer", "display", "checkpoint", "evaluation")
REDUCE = "reduce"
"""A further part, of several processes: the wait for the sums of their gradients."""
STEP = "step"
"""All parts but those between updates together, where they are not measured apart."""
BETWEEN = ("checkpoint", "evaluation")


class StepClock:
    """Splits the time between `begin` and `end` into named parts.

    On a CPU each `mark` reads the host clock. On CUDA it records an event: a part is the device
    time between two marks, including gaps in which the device waits for the host, and so is all of
    it; `end`, or the function that `end_later` returns, reads the events and is the only call that
    synchronizes. On mps each `mark` synchronizes.

    With `apart` False, for CUDA, only the parts BETWEEN updates are marked, and the rest is STEP:
    one event an update.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._pool: list[torch.cuda.Event] = []
        self._events: list[tuple[str | None, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}
        self._begin = self._last = 0.0
        self._apart = True
        self._end: torch.cuda.Event | None = None  # of what was measured before
        self.begin()

    def begin(self, apart: bool = True) -> None:
        """Start a new measurement, at once after an `end_later` where there was one."""
        self._apart = apart or not self._cuda
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._begin = self._last = time.perf_counter()
        if self._cuda:
            self._events = []
            if self._end is None:
                self._record(None)
            else:
                self._events.append((None, self._end))
            self._end = None

    def mark(self, part: str, seconds: float | None = None) -> None:
        """Count the time since the last `mark`, `skip` or `begin` as `part`; on a CPU only
        `seconds` of it where given, and the rest as what is marked next."""
        if self._cuda:
            if self._apart or part in BETWEEN:
                self._record(part)
            return
        if self._device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter() if seconds is None else self._last + seconds
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def skip(self, before: str = "") -> None:
        """Count the time since the last `mark` as no part; `before` is the part that begins."""
        if self._cuda and (self._apart or before in BETWEEN):
            self._record(None)
        self._last = time.perf_counter()

    def end(self) -> dict[str, float]:
        """Return the seconds of each part, of all (`wall`), and of no part (`unexplained`)."""
        return self.end_later()()

    def end_later(self) -> Callable[[], dict[str, float]]:
        """End the measurement, and return what waits for the device and gives what `end` does. It
        is to be called once, at any time."""
        if self._cuda:
            self._record(None)
            self._end = self._events[-1][1]
        wall, seconds, events = time.perf_counter() - self._begin, self._seconds, self._events
        apart = self._apart

        def read() -> dict[str, float]:
            whole = wall
            if events:
                events[-1][1].synchronize()
                whole = events[0][1].elapsed_time(events[-1][1]) * 1e-3
                for (_, before), (part, after) in pairwise(events):
                    if part is not None:
                        of_part = before.elapsed_time(after) * 1e-3
                        seconds[part] = seconds.get(part, 0.0) + of_part
                self._pool.extend(event for _, event in events[:-1])  # the last begins what follows
            if not apart:
                seconds[STEP] = whole - sum(seconds.values())
            return {**seconds, "wall": whole, "unexplained": whole - sum(seconds.values())}

        return read

    def _record(self, part: str | None) -> None:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append((part, event))
