"""Work on a second stream of a GPU, while the current one goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

End = torch.cuda.Event | None
"""An end to wait for; None where there is nothing to wait for."""


class SideStream:
    """Launches in the order of `run`, each after what the current stream has launched before it.
    Both streams may be under capture. On a CPU, or without the second stream, all of it is done at
    once."""

    def __init__(self, device: torch.device) -> None:
        self._own = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stream = self._own

    def use(self, second_stream: bool) -> None:
        """Whether the second stream is used from now on."""
        self._stream = self._own if second_stream else None

    def run(self, launch: Callable[[], None]) -> End:
        """Launch on the second stream; returns its end."""
        if self._stream is None:
            launch()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            launch()
            end = torch.cuda.Event()
            end.record(self._stream)
        return end

    def join(self, end: End) -> None:
        """Have the current stream wait for an end, and so for all that was launched before it."""
        if end is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(end)

    def join_all(self) -> None:
        """Have the current stream wait for all that was launched."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In here all is launched on the current stream."""
        stream, self._stream = self._stream, None
        try:
            yield
        finally:
            self._stream = stream
