"""Runs one experiment and keeps what it finds: the record, and where the experiment has them, a
table and a picture of the whole record beside it.

An experiment is a module with UNIT and `run(device, quick, say)`, which gives rows, as a list or
one after the other. It may have `table(record) -> str` and `draw(record) -> Figure | None`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from onelaunch.bench import plots
from onelaunch.bench.record import Row, device_name, write_record
from onelaunch.checkpoints.atomic import read_json, write_text
from onelaunch.errors import MissingExtra, RunFailed

SAVE_SECONDS = 5.0


def conduct(
    experiment: str, device: str, quick: bool, folder: Path, say: Callable[[str], None]
) -> Path:
    """Run an experiment on a device; returns the record's path.

    Rows are on disk a few seconds after they are made: a run that fails, or is stopped, leaves
    those that it had. Raises RunFailed where there were none.
    """
    module = importlib.import_module(f"onelaunch.bench.{experiment.replace('-', '_')}")
    name = device_name(device)
    fresh: list[Row] = []
    path: Path | None = None
    saved_at = time.monotonic()
    try:
        for row in module.run(device, quick, say):
            fresh.append(row)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                path = write_record(experiment, module.UNIT, fresh, folder, name)
                fresh, saved_at = [], time.monotonic()
    finally:
        if fresh:
            path = write_record(experiment, module.UNIT, fresh, folder, name)
        if path is not None:
            _leave_views(module, path, say)
            say(f"record: {path}")
    if path is None:
        raise RunFailed(f"{experiment}: no case could be timed")
    return path


def _leave_views(module: ModuleType, path: Path, say: Callable[[str], None]) -> None:
    record = read_json(path)
    if hasattr(module, "table"):
        text = module.table(record)
        write_text(path.with_suffix(".md"), text)
        say(text.rstrip())
    if hasattr(module, "draw"):
        try:
            figure = module.draw(record)
        except MissingExtra as error:
            say(str(error))
            return
        if figure is not None:
            plots.save(figure, path.with_suffix(".png"))
