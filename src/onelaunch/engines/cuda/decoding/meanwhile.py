"""A session in which PyTorch generates while the kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request
from onelaunch.engines.cuda.decoding.split import Split
from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent

TIMEOUT = 0.4
"""Seconds that a request waits for kernels, so that those of the store have time to be loaded."""


class Meanwhile:
    """A `Session` of requests that are written by `session`, or to their end by one of `other`:
    where `compiling` says that the kernels of one are not there after `timeout` seconds, it and
    whatever comes until `other` has none left.

    `compiling` starts to compile what a request needs, and returns a future that is done when it
    is there; an error of it is left to `session`.
    """

    def __init__(
        self,
        config: ModelConfig,
        session: Session,
        other: Callable[[], Session],
        compiling: Callable[[Request], Future[None]],
        log: Callable[[str], None],
        timeout: float = TIMEOUT,
    ) -> None:
        self._config, self._sessions = config, Split(session, other)
        self._compiling, self._log, self._timeout = compiling, log, timeout
        self._logged = False

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        compiled = self._compiling(request)
        if not self._sessions.of_other:  # those of one call are all written by one
            wait([compiled], self._timeout)
            if compiled.done():
                self._sessions.submit(request)
                return
        if not self._logged:
            self._logged = True
            self._log("compiling the kernels that generate; they are kept for the next time")
        self._sessions.submit_to_other(request)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on for so many seconds; see `Session`."""
        return self._sessions.step(seconds)

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        self._sessions.cancel(id)

    def close(self) -> None:
        """End all requests."""
        self._sessions.close()
