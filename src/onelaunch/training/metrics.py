"""Write metrics.jsonl, one JSON object per line, from a thread that never blocks training.

docs/metrics.md describes the records.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import atomic_file, write_error
from onelaunch.errors import OnelaunchError
from onelaunch.training.sinks import Sink

SCHEMA = 1
QUEUE_RECORDS = 10_000
GATHER_SECONDS = 0.02


class MetricsWriter:
    """Appends records to a file from its own thread, and passes them to `sinks`.

    The queue is bounded: if the disk stalls until it is full, records are dropped and counted in
    `dropped`, and the count is written once the disk responds. If the file is removed or replaced,
    records continue in a file of the same name, a new one starting with the last "run" record;
    `log` is then called, from the thread.
    """

    def __init__(self, path: Path, queue_records: int = QUEUE_RECORDS) -> None:
        self.path = path
        self.dropped = 0
        self.error: OnelaunchError | None = None
        self.log: Callable[[str], None] = lambda line: None
        self.sinks: Sequence[Sink] = ()
        self._run_record: dict[str, Any] | None = None
        self._reported_drops = 0
        self._queue: queue.Queue[dict[str, Any] | threading.Event | None] = queue.Queue(
            queue_records
        )
        try:
            self._descriptor = _open(path)
        except OSError as error:
            raise write_error(path, error) from error
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def push(self, record: dict[str, Any]) -> None:
        """Queue a record; never waits."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
        for sink in self.sinks:
            sink.push(record)

    def flush(self, seconds: float = 5.0) -> bool:
        """Wait until all queued records are on the disk, at most `seconds`."""
        done = threading.Event()
        deadline = time.monotonic() + seconds
        try:
            self._queue.put(done, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(max(0.0, deadline - time.monotonic()))

    def close(self, seconds: float = 5.0) -> None:
        """Write what is queued and end the thread, and the sinks; gives up after `seconds`."""
        for sink in self.sinks:
            sink.close()
        self.flush(seconds)
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        while True:
            items = self._next_items()
            self._write(items)
            if None in items:
                return

    def _next_items(self) -> list[dict[str, Any] | threading.Event | None]:
        """Those of GATHER_SECONDS, so that short updates do not wake the thread each; at once where
        somebody waits."""
        items = [self._queue.get()]
        until = time.monotonic() + GATHER_SECONDS
        with suppress(queue.Empty):
            while len(items) < 256 and isinstance(items[-1], dict):
                items.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
        return items

    def _write(self, items: list[dict[str, Any] | threading.Event | None]) -> None:
        records = [item for item in items if isinstance(item, dict)]
        if self.dropped > self._reported_drops:
            self._reported_drops = self.dropped
            records.append({"kind": "dropped", "count": self._reported_drops})
        waiting = [item for item in items if isinstance(item, threading.Event)]
        if self.error is None:
            try:
                if self._reopened() and self._run_record is not None:
                    records.insert(0, self._run_record)
                self._run_record = next(
                    (r for r in records if r.get("kind") == "run"), self._run_record
                )
                data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
                while data:
                    data = data[os.write(self._descriptor, data) :]
                if waiting:
                    os.fsync(self._descriptor)
            except OSError as error:
                self.error = write_error(self.path, error)
        for done in waiting:
            done.set()

    def _reopened(self) -> bool:
        """Reopen the path if it is no longer the open file; returns whether it is a new file."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return False
        descriptor = _open(self.path)
        os.close(self._descriptor)
        self._descriptor = descriptor
        self.log(f"{self.path} was removed or replaced; writing to a file of that name")
        return os.fstat(descriptor).st_size == 0


def _open(path: Path) -> int:
    # Raw: a line is one write, and no Python lock is held while the disk stalls.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def drop_after(path: Path, update: int, eval_done: int) -> None:
    """Remove records of work that a resume repeats: updates after `update`, evaluations and samples
    after `eval_done`, and an incomplete last line."""
    if not path.exists():
        return
    limits = {"update": update, "eval": eval_done, "sample": eval_done}
    with atomic_file(path) as out, open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                repeated = record.get("update", 0) > limits.get(record.get("kind"), math.inf)
            except (ValueError, AttributeError, TypeError, RecursionError):
                continue  # not a record of ours
            if line.endswith(b"\n") and not repeated:
                out.write(line)
