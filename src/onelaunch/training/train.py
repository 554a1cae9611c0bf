"""Train from what names a recipe and a run: behind `onelaunch.train` and the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onelaunch.training.folders import default_run_folder, newest_run
from onelaunch.training.loop import Outcome
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import resume as resume_run
from onelaunch.training.run import start

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
) -> Outcome:
    """Start a run, or with `resume` continue one; see `onelaunch.train` for the arguments.

    log: called with a line where something was chosen, such as the newest run.
    Raises what `run.start` and `run.resume` do.
    """
    settings = dict(settings)
    Recipe().with_settings(settings, SETTINGS)  # an unknown key is not the recipe's fault
    if recipe is None and not resume:
        recipe = DEFAULT_RECIPE
    name = ""
    if isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(dict(recipe), "recipe")
    elif isinstance(recipe, str | Path):
        name = Path(recipe).stem
        recipe = Recipe.load(str(recipe))
    if recipe is not None:
        recipe = recipe.with_settings(settings, SETTINGS)
    if resume:
        if run is None:
            run = newest_run()
            log(f"the newest run is {run}")
        return resume_run(run, settings, recipe, quiet)
    assert recipe is not None
    place = run or default_run_folder(name or recipe.model.preset or "run")
    return start(recipe, place, quiet, numbered=run is None)


def resume_command(run: Path, quiet: bool) -> list[str]:
    """The command line of a process that continues a run."""
    command = [sys.executable, "-m", "onelaunch", "train", "--resume", "--run", str(run)]
    return [*command, "--quiet"] if quiet else command
