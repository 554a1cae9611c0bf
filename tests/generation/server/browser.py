"""Chromium without a head, driven through a pipe (the DevTools protocol)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120


class Browser:
    """A page; `failures` are its errors so far."""

    def __init__(self, writer: int, reader: int) -> None:
        self._writer, self._reader = writer, reader
        self._ids, self._data = itertools.count(1), b""
        self._session: str | None = None
        self.failures: list[Any] = []

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait in the page for an expression to be true; returns it."""
        return self.run(
            f"new Promise(done => {{ const look = () => {{ const value = {condition}; "
            "if (value) done(value); else setTimeout(look, 20); }; look(); })"
        )

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.failures.append(answer["params"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._data:
            assert select.select([self._reader], [], [], SECONDS)[0], "the browser does not answer"
            new = os.read(self._reader, 1 << 16)
            assert new, "the browser has ended"
            self._data += new
        message, _, self._data = self._data.partition(b"\0")
        return dict(json.loads(message))


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is here, and CHROME names none")
    commands, answers = os.pipe(), os.pipe()

    def hand_over() -> None:
        # at 3 and 4 in the child; through higher numbers, as either may be one of those
        high = [os.dup2(fd, 100 + i) for i, fd in enumerate((commands[0], answers[1]))]
        for i, fd in enumerate(high):
            os.dup2(fd, 3 + i)

    process = subprocess.Popen(
        [
            found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
        ],
        preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Browser(commands[1], answers[0])
    finally:
        process.kill()
        process.wait()
        os.close(commands[1])
        os.close(answers[0])
