"""The child process that runs a program: a bad one can kill the process that it runs in.

Run as `python -m onelaunch.engines.coreml.child MODULE:ATTRIBUTE`, the attribute a class that is a
Backend. Each line that it is told is JSON: what to do, and the seconds that it has at most; each is
answered by a line: what was found, or "refused" or "failed" with a reason.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.compilation.background import MAX_REASON_LENGTH, printable
from onelaunch.compilation.children import parent_lines
from onelaunch.engines.coreml.backend import HANDED, Arrays, Backend, Interface
from onelaunch.engines.coreml.package import Type
from onelaunch.engines.coreml.shared import Shared
from onelaunch.errors import OnelaunchError, RunFailed

Message = dict[str, Any]


class _Worker:
    """Does what it is told, in methods of that name."""

    def __init__(self, backend: str) -> None:
        self._name = backend

    def answer(self, message: Message) -> Message:
        try:
            found: Message = getattr(self, message["do"])(message)
            return found
        except RunFailed as error:
            return {"failed": printable(str(error))}
        except (OnelaunchError, ImportError) as error:
            return {"refused": printable(str(error))}
        except Exception as error:  # whatever coremltools and Core ML raise
            # all of its lines: the first one of Core ML's is a brace
            text = f"{type(error).__name__}: {error}"[: 4 * MAX_REASON_LENGTH]
            return {"failed": printable(text)}

    def load(self, message: Message) -> Message:
        module, _, attribute = self._name.partition(":")
        self._backend: Backend = getattr(importlib.import_module(module), attribute)()
        start = time.perf_counter()
        found = self._backend.load(
            Path(message["package"]), Path(message["folder"]), message["units"]
        )
        seconds = time.perf_counter() - start
        self._interface = found
        return {**asdict(found), "seconds": seconds}

    def share(self, message: Message) -> Message:
        self._shared = Shared.found(self._interface, message["name"])
        return {}

    def predict(self, message: Message) -> Message:
        inputs, shared = self._interface.inputs, self._shared
        start = time.perf_counter()
        given = {
            name: np.ascontiguousarray(shared.input(name, dtype), HANDED[inputs[name].dtype])
            for name, dtype in message["dtypes"].items()
        }
        converted = time.perf_counter()
        outputs, core_ml_seconds = self._backend.predict(given)
        predicted = time.perf_counter()
        found = {
            name: _checked(name, each, outputs) for name, each in self._interface.outputs.items()
        }
        seconds = (converted - start, predicted - converted, time.perf_counter() - predicted)
        for name, array in found.items():
            np.copyto(shared.output(name), array)
        return {"seconds": seconds, "core_ml": core_ml_seconds}

    def plan(self, message: Message) -> Message:
        return {"operations": [asdict(each) for each in self._backend.plan()]}


def read_interface(data: Message) -> Interface:
    """From an answer to "load"."""
    read = {
        way: {name: Type(each["dtype"], tuple(each["shape"])) for name, each in data[way].items()}
        for way in ("inputs", "outputs")
    }
    return Interface(**read)


def _checked(name: str, expected: Type, outputs: Arrays) -> np.ndarray:
    if name not in outputs:
        raise RunFailed(f"there is no output {name}")
    found = np.asarray(outputs[name])
    if found.shape != expected.shape:
        raise RunFailed(f"output {name} is of shape {found.shape}, not {expected.shape}")
    return np.ascontiguousarray(found, HANDED[expected.dtype])


def main() -> None:
    """In the child process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    lines = parent_lines()
    worker = _Worker(sys.argv[1])
    # what Core ML may print is no answer
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)
        with suppress(BrokenPipeError, KeyboardInterrupt):
            while True:
                message = json.loads(lines.get())
                # coremltools keeps the interpreter's lock while Core ML works: where that hangs and
                # the parent is gone, no thread here can see it, and only the system can end this
                signal.setitimer(signal.ITIMER_REAL, message["seconds"])
                answer = worker.answer(message)
                signal.setitimer(signal.ITIMER_REAL, 0)
                print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
