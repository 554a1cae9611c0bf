"""Forms measured in a process of their own, while the engine answers.

A candidate that breaks the device's context breaks nothing here, and no graph is captured here
behind a caller's back: while one is, in whichever thread, nobody can wait for the device.

Run as `python -m onelaunch.engines.cuda.measuring`: a line of JSON says what is to be measured. The
child asks for the device by a line, TURN, goes on at GO, and says OVER some milliseconds later; its
last line is what it has found, or what failed, as JSON.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.compilation.cache import Store
from onelaunch.compilation.children import Child, lines_of_parent
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.choice import Choice, bucket, facts_of, find, keep, read_choice
from onelaunch.engines.cuda.compilers import PROCESS_BYTES, form_bytes
from onelaunch.engines.cuda.measure import SECONDS
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.timer import device_facts, measured
from onelaunch.engines.cuda.turns import measuring_alone, turns_of
from onelaunch.errors import RunFailed

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

COMMAND = (sys.executable, "-m", "onelaunch.engines.cuda.measuring")
TURN, GO, OVER = "turn", "go", "over"
LOOK_SECONDS = 0.1
# seconds; a child that takes longer hangs
LONGEST_TURN = 30.0
LONGEST_SECONDS = 3 * SECONDS
DEVIATION = 0.02
GIB = 1 << 30


def choose(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    sequence: int,
    store: Store,
    cancelled: Callable[[], bool] = lambda: False,
    used: torch.cuda.Event | None = None,
    command: Sequence[str] = COMMAND,
) -> Choice:
    """As timer.choose, with random weights in a process of its own, in turns with whoever uses the
    device here; `used` is recorded at the end of each of their turns. While another process is
    measuring on the device it waits, and takes what that has found where it is the same shape.
    Raises RunFailed where nothing runs, memory is short, the process fails, or it is cancelled."""
    name = str(dtype).removeprefix("torch.")
    facts = facts_of(config, name, batch, sequence, device_facts(device))
    subject = {
        "config": config.to_dict(),
        "dtype": name,
        "device": device.index or 0,
        "batch": batch,
        "sequence": sequence,
    }
    with measuring_alone(store, device, cancelled, LONGEST_SECONDS):
        choice = find(store, facts)
        if choice is None:
            _check_memory(config, dtype.itemsize, bucket(config, batch, sequence), device)
            choice = _ask(config, subject, command, turns_of(device).turn, cancelled, used)
            keep(store, facts, choice)
    return choice


def _check_memory(
    config: ModelConfig, itemsize: int, shape: tuple[int, int], device: torch.device
) -> None:
    """Raise RunFailed where measuring could leave too little of the device's memory to others: a
    process, its weights, and two forms."""
    batch, sequence = shape
    weights = (config.n_params + config.vocab_size * config.dim) * itemsize  # a tied head is copied
    needed = PROCESS_BYTES + weights + 2 * form_bytes(config, batch * sequence, itemsize)
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        raise RunFailed(
            f"measuring takes {needed / GIB:.1f} GiB of the device's memory, {free / GIB:.1f} are "
            "free"
        )


def _ask(
    config: ModelConfig,
    subject: Mapping[str, Any],
    command: Sequence[str],
    turn: Callable[[], AbstractContextManager[None]],
    cancelled: Callable[[], bool],
    used: torch.cuda.Event | None,
) -> Choice:
    """What a child finds."""
    child = Child(command)
    try:
        data = _converse(child, json.dumps(subject), turn, cancelled, used)
    finally:
        child.end()
    if "failed" in data:
        raise RunFailed(str(data["failed"]))
    try:
        return read_choice(data, config.n_layers)
    except (ValueError, TypeError, KeyError) as error:
        raise RunFailed(f"what was measured is no choice: {error}") from error


def _converse(
    child: Child,
    subject: str,
    turn: Callable[[], AbstractContextManager[None]],
    cancelled: Callable[[], bool],
    used: torch.cuda.Event | None,
) -> dict[str, Any]:
    """Give turns until the answer comes."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(child, lines), daemon=True).start()
    child.tell(subject)
    # when it has to have said something else: all, and in its turn
    end = turn_end = time.monotonic() + LONGEST_SECONDS
    with ExitStack() as held:
        while True:
            if cancelled():
                raise RunFailed("cancelled")
            if time.monotonic() > min(end, turn_end):
                raise RunFailed("the measuring process hangs")
            try:
                line = lines.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if line == TURN and turn_end == end:
                held.enter_context(turn())
                if used is not None:
                    used.synchronize()
                turn_end = time.monotonic() + LONGEST_TURN
                child.tell(GO)
            elif line == OVER:
                held.close()
                turn_end = end
            elif line:
                return _answer(line)
            else:
                raise RunFailed(f"the measuring process ended ({child.reason()})")


def _answer(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise RunFailed("the measuring process said what is no answer")
    return data


def _hear(child: Child, lines: queue.SimpleQueue[str]) -> None:
    """Lines as they come, and an empty one at the end."""
    while line := child.hear():
        lines.put(line)
    lines.put("")


class _RandomWeights(Mapping[str, Tensor]):
    """Made as they are asked for, and not kept."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._dtype, self._device = config.weight_shapes(), dtype, device

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        return torch.randn(shape, dtype=self._dtype, device=self._device) * DEVIATION

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class _Parent:
    """In the child: who gives turns, and is told."""

    def __init__(self, told: IO[str]) -> None:
        self._told, self._lines = told, lines_of_parent()

    def hear(self) -> str:
        return self._lines.get()

    def tell(self, line: str) -> None:
        print(line, file=self._told, flush=True)

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.tell(TURN)
        self.hear()
        try:
            yield
        finally:
            self.tell(OVER)


def _measure(parent: _Parent) -> dict[str, Any]:
    subject = json.loads(parent.hear())
    config = ModelConfig.from_dict(subject["config"])
    device, dtype = torch.device("cuda", subject["device"]), getattr(torch, subject["dtype"])
    torch.cuda.set_device(device)
    packed = pack(config, _RandomWeights(config, dtype, device), dtype, device)
    return asdict(measured(config, packed, subject["batch"], subject["sequence"], parent.turn))


def main() -> None:
    """In the child process."""
    # what a library may print is no answer
    with os.fdopen(os.dup(1), "w", encoding="ascii") as told:
        os.dup2(2, 1)
        parent = _Parent(told)
        with suppress(BrokenPipeError):
            try:
                answer = _measure(parent)
            except Exception as error:  # whatever PyTorch, Triton or the driver raises
                answer = {"failed": in_a_line(error)}
            parent.tell(json.dumps(answer))


if __name__ == "__main__":
    main()
