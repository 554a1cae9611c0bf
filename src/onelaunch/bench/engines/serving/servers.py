"""The two servers, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onelaunch.bench.peers import llama_cpp
from onelaunch.compilation.environment import child_environment
from onelaunch.errors import RunFailed

CHILD = Path(llama_cpp.__file__).with_name("llama_cpp_server.py")
_ADDRESS = re.compile(r"http://127\.0\.0\.1:([0-9]+)")


@contextmanager
def ours(model: Path, device: str) -> Iterator[int]:
    """The port of `onelaunch serve` on a model, until the block ends."""
    options = ("--port", "0", "--dtype", "bfloat16", "--device", device)
    with _server([sys.executable, "-m", "onelaunch", "serve", str(model), *options]) as port:
        yield port


@contextmanager
def theirs(python: Path, model: Path, slots: int) -> Iterator[int]:
    """The port of llama.cpp's server on a model, until the block ends."""
    with _server([str(python.absolute()), str(CHILD), str(model), str(slots)]) as port:
        yield port


@contextmanager
def _server(command: list[str]) -> Iterator[int]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=child_environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if match := _ADDRESS.search(line):
                break
        else:
            raise RunFailed(f"{command[1]}: it ended: {''.join(lines[-3:]).strip()}")
        yield int(match[1])
    finally:
        process.kill()
        process.communicate()
