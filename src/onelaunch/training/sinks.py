"""TensorBoard and Weights & Biases: where the records of metrics.jsonl go as well.

A field of a record is named KIND/FIELD, such as update/loss; the step is the update. Each sink has
a thread and a bounded queue, so that neither a slow nor a failing one has an effect on training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from onelaunch.errors import MissingExtra
from onelaunch.training.recipe import Recipe

QUEUE_RECORDS = 10_000
CLOSE_SECONDS = 15.0
INIT_SECONDS = 30.0  # a process does not end before wandb has given up
_NO_METRICS = ("kind", "update", "time", "best")


class Service(Protocol):
    """What records are sent to, from one thread."""

    def write(self, update: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        """Send the fields of a record."""

    def close(self) -> None:
        """Finish sending."""


class Sink:
    """Sends records to a service from its own thread, which makes the service.

    At the first error it calls `log` with a line, and sends nothing more.
    """

    def __init__(self, name: str, make: Callable[[], Service], log: Callable[[str], None]) -> None:
        self.name = name
        self._make, self._log = make, log
        self._dropped = 0
        self._ended = False
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_RECORDS)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def push(self, record: dict[str, Any]) -> None:
        """Queue a record; never waits."""
        if self._ended:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is queued and end the thread; gives up after `seconds`."""
        if not self._ended:
            with suppress(queue.Full):
                self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._end(f"did not end within {seconds:g} s; records may be missing there")
        elif self._dropped:
            self._end(f"too slow; {self._dropped} records are missing there")

    def _run(self) -> None:
        try:
            service = self._make()
            while (record := self._queue.get()) is not None:
                numbers, texts = dict(_numbers(record)), dict(_texts(record))
                if numbers or texts:
                    service.write(record["update"], numbers, texts)
            service.close()
        except BaseException as error:  # this thread's own; wandb raises some that are no Exception
            reason = " ".join(str(error).split()) or type(error).__name__
            self._end(f"{reason}; no more records go there")

    def _end(self, reason: str) -> None:
        """Take no more records; one line says why."""
        if not self._ended:
            self._ended = True
            self._log(f"{self.name}: {reason}")


def check_installed(recipe: Recipe) -> None:
    """Raise MissingExtra if a sink of the recipe needs a package that is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(recipe.log, name) and importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "log", f"log.{name}")


def start_sinks(recipe: Recipe, run: Path, update: int, log: Callable[[str], None]) -> list[Sink]:
    """Start the sinks of a recipe, for a run that is at `update`. `log` gets a line where one
    fails, from its thread."""
    sinks = []
    if folder := recipe.log.tensorboard:
        path = Path(folder) / run.name
        sinks.append(Sink("tensorboard", lambda: TensorBoard(recipe, path, update), log))
    if recipe.log.wandb:
        sinks.append(Sink("wandb", lambda: WeightsAndBiases(recipe, run), log))
    return sinks


class TensorBoard:
    """Event files in a folder. What a resumed run repeats is removed from the charts."""

    def __init__(self, recipe: Recipe, folder: Path, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=update + 1)
        if not update:
            self._writer.add_text("recipe", f"```\n{recipe.to_toml()}\n```")

    def write(self, update: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        for tag, number in numbers.items():
            self._writer.add_scalar(tag, number, update)
        for tag, text in texts.items():
            self._writer.add_text(tag, text, update)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project, of the same name as the run folder; a resumed run continues it."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        import wandb

        config = asdict(recipe)
        del config["source"]
        # of the moment of the start, the data and the name
        identity = hashlib.sha256((run / "run.json").read_bytes()).hexdigest()[:16]
        # in `setup` as well: otherwise it asks for a key on a terminal that is drawn on
        settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS)
        wandb.setup(settings)
        self._run = wandb.init(
            project=recipe.log.wandb,
            name=run.name,
            id=identity,
            resume="allow",
            config=config,
            dir=str(run),
            settings=settings,
        )

    def write(self, update: int, numbers: dict[str, float], texts: dict[str, str]) -> None:
        self._run.log({**numbers, **texts}, step=update)

    def close(self) -> None:
        self._run.finish()


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if record["kind"] not in ("update", "eval"):
        return
    for key, value in record.items():
        if key in _NO_METRICS:
            continue
        values = value if isinstance(value, dict) else {"": value}
        for inner, number in values.items():
            if isinstance(number, int | float):
                yield "/".join(filter(None, (record["kind"], key, inner))), number


def _texts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if record["kind"] == "sample":
        yield "sample/text", record["prompt"] + record["text"]
