"""`onelaunch train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from onelaunch.cli.common import Debug, Quiet, program, say
from onelaunch.errors import BadInput


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or a built-in one: quickstart (the default), shakespeare-char.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Train this shape.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DIR", help="A folder made by `onelaunch prepare`, or: stories."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="Run folder; default: a new one under runs/, with --resume the newest there.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run exactly where it stopped.")
    ] = False,
    accum: Annotated[
        int | None,
        typer.Option("--accum", metavar="N", help="Micro-steps per update, 1 to 1000."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="reference (PyTorch), or coreml: layers as ML Programs, by Core ML on a Mac, "
            "elsewhere evaluated.",
        ),
    ] = None,
    compile_budget: Annotated[
        int | None,
        typer.Option(
            "--compile-budget",
            metavar="N",
            min=0,
            help="coreml: after N compilations save, and go on in a fresh process; 0, the usual: "
            "never.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="Change one key of the recipe; repeatable. train.seed=N draws other weights and "
            "batches; 1337 unless the recipe names it.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a model, or continue a run."""
    from onelaunch.training.recipe import MAX_ACCUM, Recipe, parse_setting

    settings: dict[str, Any] = {}
    for text in set_ or []:
        try:
            key, value = parse_setting(text)
        except BadInput as error:
            raise BadInput(f"--set {error}") from None
        settings[key] = value
    if accum is not None:
        if not 1 <= accum <= MAX_ACCUM:
            raise BadInput(f"--accum {accum}: must be from 1 to {MAX_ACCUM}")
        settings["train.accum"] = accum
    if device is not None:
        settings["train.device"] = device
    if engine is not None:
        settings["train.engine"] = engine
    if compile_budget is not None:
        settings["coreml.compile_budget"] = compile_budget
    given: Recipe | None = None
    if recipe is not None:
        given = Recipe.load(recipe)
    elif preset is not None:
        given = Recipe()
    elif not resume:
        given = Recipe.load("quickstart")
    named = {"model.preset": preset, "data.path": data}
    chosen = {key: value for key, value in named.items() if value is not None}

    from onelaunch.training.folders import default_run_folder, newest_run
    from onelaunch.training.run import resume as resume_run
    from onelaunch.training.run import start

    if resume:
        if run is None:
            run = newest_run()
            say(f"--resume without --run: the newest run is {run}", quiet)
        if given is not None:
            given = given.with_settings(chosen, "train").with_settings(settings, "--set")
        if data is not None:
            settings["data.path"] = data
        Recipe().with_settings(settings, "--set")  # what no recipe has is said by this name
        outcome = resume_run(run, settings, given, quiet)
    else:
        assert given is not None
        name = Path(recipe).stem if recipe else preset or "quickstart"
        given = given.with_settings(chosen, "train").with_settings(settings, "--set")
        place = default_run_folder(name) if run is None else run
        outcome = start(given, place, quiet, numbered=run is None)
    run = outcome.run
    if outcome.restart_requested:
        _go_on(run, quiet)
    at, folder = outcome.progress, shlex.quote(str(run))
    where = f"update {at.update}" + (f" and {at.micro} micro-steps" if at.micro else "")
    if outcome.signal is not None:
        say(f"stopped; saved at {where}; continue: {program()} train --resume --run {folder}")
        return 128 + outcome.signal
    best = ""
    if at.best_val_loss is not None:
        best = f"; best validation loss {at.best_val_loss:.4f} at update {at.best_update}"
    say(f"done: {where}{best}", quiet)
    say(f"run folder: {run}", quiet)
    say("next:", quiet)
    say(f"  {program()} generate {folder}", quiet)
    say(f"  {program()} eval {folder} --data {shlex.quote(outcome.recipe.data.path)}", quiet)
    say(f"  {program()} export {folder} model.bin --format llama2c", quiet)
    return 0


def _go_on(run: Path, quiet: bool) -> None:
    """Have a fresh process continue this run, in this one's place."""
    import os
    import sys

    from onelaunch.compilation.environment import child_environment

    say("as many compilations as the budget has: a fresh process goes on", quiet)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "onelaunch", "train", "--resume", "--run", str(run)]
    command += ["--quiet"] if quiet else []
    os.execve(sys.executable, command, child_environment())
