"""Folders of runs: names of new ones, the newest run, and the path of its data."""

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
    """Return runs/NAME-DATE-TIME, which may exist already: see `make_unique_folder`."""
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def make_unique_folder(run: Path) -> Path:
    """Make a new folder, `run` or, if it exists, run-2, run-3, ...; returns its path."""
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
    """Return the run in a folder that was created last; raises BadInput if there is none."""
    runs = []
    with suppress(OSError):
        for run in folder.iterdir():
            with suppress(BadInput, OSError, ValueError, TypeError):
                created = datetime.fromisoformat(read_run(run)["created"]).timestamp()
                # "created" is in whole seconds
                runs.append((created, (run / "run.json").stat().st_mtime_ns, run))
    if not runs:
        raise BadInput(f"{folder}/: no run to resume; pass its folder: run=DIR")
    return max(runs)[2]


def with_absolute_data(recipe: Recipe) -> Recipe:
    """Make the data path of a recipe absolute."""
    path = recipe.data.path
    if path == STORIES:
        return recipe
    return recipe.with_settings({"data.path": os.path.abspath(path)}, "data.path")


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the paths of a recipe absolute, but for that of the data."""
    paths = {"train.init": recipe.train.init, "log.tensorboard": recipe.log.tensorboard}
    absolute = {key: os.path.abspath(path) for key, path in paths.items() if path}
    return recipe.with_settings(absolute, "paths")


def path_from_run(data: str, run: Path) -> str | None:
    """Return the path of data relative to a run folder, for a run that is moved with its data."""
    if data == STORIES:
        return None
    with suppress(ValueError):  # on another drive of Windows
        return Path(os.path.relpath(os.path.realpath(data), os.path.realpath(run))).as_posix()
    return None


def with_relocated_data(recipe: Recipe, run: Path, run_json: dict[str, Any]) -> Recipe:
    """Return the recipe of a run with the current path of its data, for a run that was moved.

    Tried are its path; then the same path relative to the run, which `run_json` has; then, if the
    path is relative, that path from each parent folder of the run.
    """
    path = recipe.data.path
    if path == STORIES or Path(path).is_dir():
        return with_absolute_data(recipe)
    data = run_json.get("data")
    relative = data.get("path_from_run") if isinstance(data, dict) else None
    candidates = [run / relative] if isinstance(relative, str) else []
    if not os.path.isabs(path):
        candidates += [folder / path for folder in run.resolve().parents]
    for candidate in candidates:
        with suppress(OSError, ValueError):
            if candidate.is_dir():
                return recipe.with_settings({"data.path": os.path.realpath(candidate)}, "data.path")
    return recipe
