"""Child processes that compile kernels, each into Triton's own store on disk.

Run as `python -m onelaunch.engines.cuda.compilers`: a line of JSON says for which model, each line
after it is a job, and each is answered by a line: null, or why it cannot be.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from onelaunch.compilation.child import lower_priority, usable_cores
from onelaunch.compilation.children import Child, lines_of_parent
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.choice import STAGED, read_blocking
from onelaunch.errors import RunFailed

MOST_CHILDREN = 15
COMMAND = (sys.executable, "-m", "onelaunch.engines.cuda.compilers")
NOT_IN_TIME = "not in time"
LOOK_SECONDS = 0.02
PROCESS_BYTES = 1 << 30
"""Of the device's memory, that a process has before it holds a tensor."""
_REASON_LETTERS = 200


@dataclass(frozen=True)
class Subject:
    """What is compiled for: a model, a dtype, the number of a GPU."""

    config: ModelConfig
    dtype: str
    device: int


@dataclass(frozen=True)
class Job:
    """Kernels of a form: of one launch a stage, those of a kind, or of every kind where it is None;
    of fewer launches their one."""

    sequence: int
    form: str
    blockings: Mapping[str, Blocking]
    kind: str | None = None


def form_bytes(config: ModelConfig, rows: int, itemsize: int) -> int:
    """Of the buffers of a forward in few launches, the form that has most of them."""
    qkv = config.n_layers * (config.q_dim + 2 * config.kv_dim)
    columns = config.dim + qkv + config.q_dim + config.hidden_dim + config.vocab_size
    return rows * columns * itemsize


def how_many(config: ModelConfig, rows: int, itemsize: int, free_bytes: int) -> int:
    """Children that may run at once beside a process that measures a form of so many rows: one core
    is left, and half of the device's free memory after two such forms. At least one unless there
    is no memory for it."""
    layer = 4 * config.dim * (config.q_dim + config.hidden_dim)
    # pack multiplies the head with its norm in float32
    weights = config.vocab_size * config.dim * (4 * itemsize + 4) + 2 * itemsize * layer
    one_text = form_bytes(config, min(rows, config.max_seq_len), itemsize)
    room = (free_bytes - 2 * form_bytes(config, rows, itemsize)) // 2
    most = max(0, room // (PROCESS_BYTES + weights + one_text))
    return min(MOST_CHILDREN, max(1, usable_cores() - 1), most)


class Compilers:
    """Children at work, until `close`. Raises RunFailed for less than one."""

    def __init__(
        self,
        subject: Subject,
        count: int,
        command: Sequence[str] = COMMAND,
    ) -> None:
        if count < 1:
            raise RunFailed("too little of the device's memory is free for a compiler")
        self._subject, self._count, self._command = subject, count, command
        self._children: list[_Worker] = []

    def compile(self, jobs: Sequence[Job], deadline: float) -> list[str | None]:
        """For each job None, or why it was not done. `deadline` by `time.monotonic`: what is not
        done then is given up, with the children at work. Those that these jobs do not need end."""
        answers: list[str | None] = [NOT_IN_TIME] * len(jobs)
        waiting = list(enumerate(jobs))[::-1]
        self._children.sort(key=lambda child: not child.alive)
        self._shrink(min(len(jobs), sum(child.alive for child in self._children)))
        while len(self._children) < min(self._count, len(jobs)):
            self._children.append(_Worker(self._command, self._subject))
        threads = [
            threading.Thread(target=child.work, args=(waiting, answers), daemon=True)
            for child in self._children
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self._children and time.monotonic() >= deadline:
                self.close()
            time.sleep(LOOK_SECONDS)
        return answers

    def close(self) -> None:
        """End them."""
        self._shrink(0)

    def _shrink(self, count: int) -> None:
        for child in self._children[count:]:
            child.end()
        del self._children[count:]


class _Worker(Child):
    def __init__(self, command: Sequence[str], subject: Subject) -> None:
        super().__init__(command)
        self._subject: str | None = json.dumps(asdict(subject))

    def work(self, waiting: list[tuple[int, Job]], answers: list[str | None]) -> None:
        """Take jobs until none is left or the child has ended."""
        if self._subject is not None:
            subject, self._subject = self._subject, None
            if not self.tell(subject):
                return
        while waiting:
            try:
                number, job = waiting.pop()
            except IndexError:  # another thread was faster
                return
            line = self.hear() if self.tell(json.dumps(asdict(job))) else ""
            try:
                answers[number] = json.loads(line)
            except ValueError:  # cut off, as the child has ended
                if not self.ended_by_us:
                    answers[number] = f"the compiler ended ({self.reason()})"
                return


class _Compiler:
    """In a child: kernels of one model."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        import torch

        from onelaunch.engines.cuda.pack import pack

        self.config = ModelConfig.from_dict(subject["config"])
        self.dtype = getattr(torch, subject["dtype"])
        device = torch.device("cuda", subject["device"])
        torch.cuda.set_device(device)
        # a stage's kernels are the same for every layer, and nothing is launched
        self.one_layer = self.config.with_(n_layers=1)
        shapes = self.one_layer.weight_shapes()
        weights = {
            name: torch.zeros(shape, device=device, dtype=self.dtype)
            for name, shape in shapes.items()
        }
        self.packed = pack(self.one_layer, weights, self.dtype, device)

    def __call__(self, job: Mapping[str, Any]) -> None:
        from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape

        # one text: kernels are the same for any number of rows
        shape = Shape(1, job["sequence"], True, self.dtype)
        blockings = {kind: read_blocking(b) for kind, b in job["blockings"].items()}
        if job["form"] == STAGED:
            bound = BoundForward(self.one_layer, self.packed, shape, blockings)
        else:
            bound = FusedForward(self.config, self.packed, shape, blockings, job["form"])
        stages = bound.plan.stages
        for number, call in enumerate(bound.calls):
            if job["kind"] is None or stages[number].kind == job["kind"]:
                call.load()  # that tells whether it fits


def _answer(work: Callable[[Mapping[str, Any]], None], line: str) -> str:
    try:
        work(json.loads(line))
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        return json.dumps((str(error).strip() or type(error).__name__)[:_REASON_LETTERS])
    return json.dumps(None)


def main() -> None:
    """In the child process."""
    lower_priority()
    lines = lines_of_parent()
    # what a compiler may print is no answer
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)
        with suppress(BrokenPipeError, KeyboardInterrupt):
            work = _Compiler(json.loads(lines.get()))
            while True:
                print(_answer(work, lines.get()), file=answers, flush=True)


if __name__ == "__main__":
    main()
