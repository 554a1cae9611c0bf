"""What warm-up measures in processes of their own: micro-steps one by one, from the first.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.warm_up.child WHAT DEVICE MODEL TOKENS
STEPS UPDATES AFTER`; it prints one JSON object. After STEPS micro-steps come UPDATES updates, each
followed by AFTER more.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from onelaunch.bench.studies.ane_mega_kernel.program_training import Driver, driver, pytorch_driver


def measure(training: Driver[Any], steps: int, updates: int, after: int) -> dict[str, Any]:
    """Milliseconds of every micro-step, without the wait for a compilation: of the first ones, and
    of those after each update."""
    times: dict[str, Any] = {"first": _micro_steps(training, steps), "after": []}
    for _ in range(updates):
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.engine.after_update()
        times["after"].append(_micro_steps(training, after))
    return times


def _micro_steps(training: Driver[Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        texts = training.texts()
        training.engine.telemetry()
        training.wait()
        start = time.perf_counter()
        training.engine.train_step(*texts, 1 / count)
        training.wait()
        seconds = time.perf_counter() - start
        seconds -= training.engine.telemetry().get("stall_seconds", 0.0)
        times.append(round(1e3 * seconds, 4))
    return times


def main(what: str, device: str, model: str, *numbers: str) -> dict[str, Any]:
    """Of PyTorch, or through ML Programs."""
    tokens, *counts = (int(number) for number in numbers)
    if what == "PyTorch":
        return measure(pytorch_driver(model, tokens, device), *counts)
    with driver(model, tokens, staleness=0) as training:
        return measure(training, *counts)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
