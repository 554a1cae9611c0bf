"""Where a run's folder is made, which run is the newest, and where a run's data lies."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import write_error
from onelaunch.checkpoints.run_folder import read_run
from onelaunch.errors import BadInput
from onelaunch.training.data import STORIES
from onelaunch.training.recipe import Recipe

RUNS = Path("runs")


def default_run_folder(name: str) -> Path:
    """runs/NAME-DATE-TIME; it need not be free, see `claim`."""
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def claim(run: Path) -> Path:
    """Make a new folder: `run`, or where that is taken run-2, run-3, ...; returns its path."""
    for number in itertools.count(1):
        folder = run if number == 1 else run.with_name(f"{run.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(folder, error) from error
        return folder
    raise AssertionError("unreachable")


def newest_run(folder: Path = RUNS) -> Path:
    """The run in a folder that was begun last; raises BadInput where there is none."""
    found = []
    with suppress(OSError):
        for run in folder.iterdir():
            with suppress(BadInput, OSError, ValueError, TypeError):
                created = datetime.fromisoformat(read_run(run)["created"]).timestamp()
                # "created" is in whole seconds
                found.append((created, (run / "run.json").stat().st_mtime_ns, run))
    if not found:
        raise BadInput(f"there is no run to resume in {folder}/; name the one to continue: run=DIR")
    return max(found)[2]


def with_absolute_data(recipe: Recipe) -> Recipe:
    """A recipe whose data is found from every working directory."""
    path = recipe.data.path
    if path == STORIES:
        return recipe
    return recipe.with_settings({"data.path": os.path.abspath(path)}, "data.path")


def path_from_run(data: str, run: Path) -> str | None:
    """A data folder's path as seen from a run folder, for a run that is moved with its data."""
    if data == STORIES:
        return None
    with suppress(ValueError):  # on another drive of Windows
        return Path(os.path.relpath(os.path.realpath(data), os.path.realpath(run))).as_posix()
    return None


def with_found_data(recipe: Recipe, run: Path, described: dict[str, Any]) -> Recipe:
    """A run's recipe with the data where it is now, for a run that was moved.

    Looked for at its path; then at the same place relative to the run, as `described` (run.json)
    has it; then, where the path is relative, below each folder around the run.
    """
    path = recipe.data.path
    if path == STORIES or Path(path).is_dir():
        return with_absolute_data(recipe)
    data = described.get("data")
    relative = data.get("path_from_run") if isinstance(data, dict) else None
    places = [run / relative] if isinstance(relative, str) else []
    if not os.path.isabs(path):
        places += [folder / path for folder in run.resolve().parents]
    for place in places:
        with suppress(OSError, ValueError):
            if place.is_dir():
                return recipe.with_settings({"data.path": os.path.realpath(place)}, "data.path")
    return recipe
