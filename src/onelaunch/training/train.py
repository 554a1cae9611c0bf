"""Train from what names a recipe and a run: behind `onelaunch.train` and the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onelaunch.training.folders import default_run_folder, newest_run
from onelaunch.training.loop import Outcome
from onelaunch.training.ranks import ALONE, Ranks
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import dry_run, start
from onelaunch.training.run import resume as resume_run

DEFAULT_RECIPE = "quickstart"
SETTINGS = "settings"
"""How messages name the settings that were given."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    run: Path | None,
    settings: Mapping[str, Any],
    resume: bool,
    quiet: bool,
    log: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Start a run, or with `resume` continue one; see `onelaunch.train` for the arguments.

    log: called with a line where something was chosen, such as the newest run.
    ranks: the processes that call this at the same time; of which the first alone is not quiet.
    Raises what `run.start` and `run.resume` do.
    """
    recipe, name = _resolve(recipe, settings, resume)
    quiet = quiet or not ranks.writes
    if resume:
        if run is None:
            run = ranks.from_first(newest_run() if ranks.writes else Path())
            log(f"the newest run is {run}")
        return resume_run(run, dict(settings), recipe, quiet, ranks)
    assert recipe is not None
    place = run or default_run_folder(name or recipe.model.preset or "run")
    return start(recipe, place, quiet, numbered=run is None, ranks=ranks)


def plan(
    recipe: str | Path | Mapping[str, Any] | Recipe | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe the run that `train` would start, see `run.dry_run`."""
    resolved, _ = _resolve(recipe, settings, resume=False)
    assert resolved is not None
    return dry_run(resolved)


def _resolve(
    recipe: str | Path | Mapping[str, Any] | Recipe | None,
    settings: Mapping[str, Any],
    resume: bool,
) -> tuple[Recipe | None, str]:
    """Return the recipe with its settings, and a name for the run, which may be empty. None, for a
    resume by the recipe of its run."""
    settings = dict(settings)
    # before the recipe is read: an unknown key is not the recipe's fault
    init = Recipe().with_settings(settings, SETTINGS).train.init
    if recipe is None and resume:
        return None, ""
    if recipe is None:
        recipe = Recipe() if init else DEFAULT_RECIPE
    name = Path(init).stem
    if isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(dict(recipe), "recipe")
    elif isinstance(recipe, str | Path):
        name = Path(recipe).stem
        recipe = Recipe.load(str(recipe))
    return recipe.with_settings(settings, SETTINGS), name


def resume_command(run: Path, quiet: bool) -> list[str]:
    """The command line of a process that continues a run."""
    command = [sys.executable, "-m", "onelaunch", "train", "--resume", "--run", str(run)]
    return [*command, "--quiet"] if quiet else command
