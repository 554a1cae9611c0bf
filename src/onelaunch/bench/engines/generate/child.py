"""What can be measured in a fresh process only: its start, its memory, its first token.

Run as `python -m onelaunch.bench.engines.generate.child WHAT MODEL`, MODEL a llama2.c file; it
prints one JSON object. The store of compiled programs is the one that ONELAUNCH_CACHE names.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

# ruff: noqa: E402 (the imports are part of what is timed)
import gc
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from onelaunch.checkpoints import load
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.engine import Request
from onelaunch.errors import OnelaunchError, RunFailed
from onelaunch.generation.decode import generate_ids

if TYPE_CHECKING:
    from onelaunch.checkpoints.weights import LoadedModel

_IMPORTED = time.perf_counter()

PROMPT = [1, 3, 100]
LONGEST_SECONDS = 240.0
AROUND = 20  # tokens before the swap and after
TOKENS_AFTER = 300
"""How many tokens after the swap are waited for."""
_PRIVATE = re.compile(r"^Private_(?:Clean|Dirty):\s+(\d+) kB$", re.MULTILINE)


def start(model: Path) -> dict[str, float]:
    """Seconds from the first import until the compiled form is there."""
    loaded = load(model)
    engine = _ready(CpuEngine(loaded.config, loaded.weights))
    now = time.perf_counter()
    described = engine.describe()
    return {
        "seconds": now - _BEGAN,
        "import_seconds": _IMPORTED - _BEGAN,
        "ready_seconds": now - _IMPORTED,
        "compiled": float(described["compiled"]),
    }


def memory(model: Path) -> dict[str, float]:
    """Growth of this process's own memory in bytes, from the imports to the end of a generation
    in the compiled form, as long as the model's context is."""
    gc.collect()
    before = private_bytes()
    loaded = load(model)
    config = loaded.config
    engine = CpuEngine(config, loaded.weights)
    del loaded
    _ready(engine)
    n = config.max_seq_len - len(PROMPT)
    generate_ids(engine, [PROMPT], n)
    gc.collect()
    after = private_bytes()
    return {
        "bytes": after - before,
        "weight_bytes": engine.describe()["weight_bytes"],
        "cache_bytes": 4 * config.n_layers * 2 * config.kv_dim * config.max_seq_len,
    }


def cold(model: Path) -> dict[str, float]:
    """Sequences one after another, from before the compiled form is there until well after."""
    # PyTorch's threads and the compiler want the same cores
    return watch_swap(load(model), LONGEST_SECONDS) | {"torch_threads": torch.get_num_threads()}


def watch_swap(loaded: LoadedModel, seconds: float) -> dict[str, float]:
    """Times of tokens around the swap; RunFailed where it does not come in so many seconds. A
    sequence is as long as the model's context; a gap may be between two of them. A step of the
    engine may return many tokens: a longest gap is between two steps, a median one that time for
    each token."""
    config = loaded.config
    times: list[float] = []  # of the step that handed out each token
    paces: list[float] = []  # a step's time for each of its tokens
    swapped_at = 0  # tokens there were when the compiled form was first seen
    n = config.max_seq_len - len(PROMPT)
    began = before = time.perf_counter()
    engine = CpuEngine(config, loaded.weights)
    while not swapped_at or len(times) < swapped_at + TOKENS_AFTER:
        session = engine.session(1, config.max_seq_len)
        session.submit(Request(0, PROMPT, n))
        while events := session.step():
            now = time.perf_counter()
            times += [now] * len(events)
            paces += [(now - before) / len(events)] * len(events)
            before = now
            if not swapped_at and engine.wait(0.0):
                swapped_at = len(times)
        if engine.failed or (not swapped_at and time.perf_counter() - began > seconds):
            raise RunFailed(f"no swap within {len(times)} tokens ({engine.failed or 'too slow'})")
    gaps = [b - a for a, b in pairwise(times)]
    if swapped_at < 2:
        raise RunFailed("the compiled form was there before the second token")
    around = gaps[max(0, swapped_at - AROUND) : swapped_at + AROUND]
    return {
        "first_token_seconds": times[0] - began,
        "swap_seconds": times[swapped_at - 1] - began,
        "swap_after_tokens": swapped_at,
        "longest_gap_ms": 1e3 * max(gaps),
        "longest_gap_at_swap_ms": 1e3 * max(around),
        "median_gap_before_ms": 1e3 * median(paces[1:swapped_at]),
        "median_gap_after_ms": 1e3 * median(paces[swapped_at + 1 :]),
    }


def private_bytes() -> int:
    """Memory that this process shares with none. RunFailed where the system does not count it."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError as error:
        raise RunFailed("this system does not count a process's own memory") from error
    return sum(1024 * int(kilobytes) for kilobytes in _PRIVATE.findall(text))


def _ready(engine: CpuEngine) -> CpuEngine:
    if not engine.wait():
        raise RunFailed(f"no compiled form ({engine.failed})")
    return engine


def main() -> None:
    """Measure what the command line names."""
    what = {"start": start, "memory": memory, "cold": cold}[sys.argv[1]]
    try:
        print(json.dumps(what(Path(sys.argv[2]))))
    except OnelaunchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
