"""Stop a run by SIGINT, SIGTERM or SIGHUP: the first one saves it, the second ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from onelaunch.errors import Terminated

NUMBERS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)

# A terminal and a wrapper may both send a signal for one Ctrl-C; a second Ctrl-C comes later.
REPEAT_SECONDS = 1.0


class StopSignals:
    """While entered, the first signal sets `received` instead of ending the process; one that comes
    more than REPEAT_SECONDS later ends it at once, by KeyboardInterrupt or Terminated."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                # an ignored signal stays ignored, as nohup needs
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
        elif now - self._since > REPEAT_SECONDS:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Terminated(number)
