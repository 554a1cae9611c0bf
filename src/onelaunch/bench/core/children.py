"""Child processes of experiments: run one, or several that begin together, for their last line."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from onelaunch.compilation.environment import child_environment
from onelaunch.errors import RunFailed

READY = "ready"
_REASON_LETTERS = 120


@dataclass(frozen=True)
class Ended:
    """A process that has ended: `output` is its last line, parsed as JSON, None where it is none;
    `reason` why it failed, or empty; `seconds` from its start signal to its end."""

    output: Any
    reason: str
    seconds: float


def run_child(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Any:
    """Run a process and return its last line, parsed as JSON. Raises RunFailed where it fails,
    prints no JSON, or takes longer than `timeout` seconds."""
    name = " ".join(command[2:4])[:_REASON_LETTERS]
    environment = child_environment() if env is None else dict(env)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{name}: it took longer than {timeout:g} s") from error
    with suppress(ValueError, IndexError):
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1])
    raise RunFailed(f"{name}: the process {_reason(done.returncode, done.stderr)}")


def together(
    commands: Sequence[Sequence[str]],
    env: Sequence[Mapping[str, str] | None] | None = None,
    timeout: float | None = None,
) -> list[Ended]:
    """Run processes that say READY once all is imported and then wait for a line, which all get at
    the same time. One that has not ended after `timeout` seconds is killed."""
    environments = env or [None] * len(commands)
    children = [
        subprocess.Popen(
            command, text=True, env=child_environment() if each is None else dict(each),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command, each in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            while (line := child.stdout.readline()) and line.strip() != READY:
                pass  # what a library prints
        start = time.monotonic()
        for child in children:
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: `_end` returns why
                child.stdin.write("go\n")
                child.stdin.flush()
        return [_end(child, start, timeout) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _end(child: subprocess.Popen[str], start: float, timeout: float | None) -> Ended:
    left = None if timeout is None else max(0.1, start + timeout - time.monotonic())
    reason, output = "", None
    try:
        out, err = child.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        reason = f"killed after {timeout:g} s"
    seconds = time.monotonic() - start
    with suppress(ValueError, IndexError):
        output = json.loads(out.splitlines()[-1])
    if not reason and (child.returncode or output is None):
        reason = _reason(child.returncode, err)
    return Ended(output, reason, seconds)


def _reason(code: int, err: str) -> str:
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:  # none that Python has a name for
            return f"ended by signal {-code}"
    last = (err.strip().splitlines() or ["it printed nothing"])[-1]
    return f"ended with {code}: {last[:_REASON_LETTERS]}"
