"""The child process that runs a program: a bad one can kill the process that it runs in.

Run as `python -m onelaunch.engines.coreml.child MODULE:ATTRIBUTE`, the attribute a class that is a
Backend. Each line on standard input is a request in JSON: its method, and a timeout in seconds;
each is answered by a line: the result, or "refused" or "failed" with a reason.
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
    """Answers requests, each by the method of that name."""

    def __init__(self, backend: str) -> None:
        self._name = backend

    def answer(self, message: Message) -> Message:
        try:
            result: Message = getattr(self, message["do"])(message)
            return result
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
        interface = self._backend.load(
            Path(message["package"]), Path(message["folder"]), message["units"]
        )
        seconds = time.perf_counter() - start
        self._interface = interface
        return {**asdict(interface), "seconds": seconds}

    def share(self, message: Message) -> Message:
        self._shared = Shared.attach(self._interface, message["name"])
        return {}

    def predict(self, message: Message) -> Message:
        inputs, shared = self._interface.inputs, self._shared
        start = time.perf_counter()
        converted_inputs = {
            name: np.ascontiguousarray(shared.input(name, dtype), HANDED[inputs[name].dtype])
            for name, dtype in message["dtypes"].items()
        }
        converted = time.perf_counter()
        outputs, core_ml_seconds = self._backend.predict(converted_inputs)
        predicted = time.perf_counter()
        results = {
            name: _checked(name, each, outputs) for name, each in self._interface.outputs.items()
        }
        seconds = (converted - start, predicted - converted, time.perf_counter() - predicted)
        for name, array in results.items():
            np.copyto(shared.output(name), array)
        return {"seconds": seconds, "core_ml": core_ml_seconds}

    def plan(self, message: Message) -> Message:
        return {"operations": [asdict(each) for each in self._backend.plan()]}


def read_interface(data: Message) -> Interface:
    """Read the interface from the response to "load"."""
    read = {
        way: {name: Type(each["dtype"], tuple(each["shape"])) for name, each in data[way].items()}
        for way in ("inputs", "outputs")
    }
    return Interface(**read)


def _checked(name: str, expected: Type, outputs: Arrays) -> np.ndarray:
    if name not in outputs:
        raise RunFailed(f"there is no output {name}")
    array = np.asarray(outputs[name])
    if array.shape != expected.shape:
        raise RunFailed(f"output {name} is of shape {array.shape}, not {expected.shape}")
    return np.ascontiguousarray(array, HANDED[expected.dtype])


def main() -> None:
    """Run the child process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    lines = parent_lines()
    worker = _Worker(sys.argv[1])
    # lines that Core ML may print are no response
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
