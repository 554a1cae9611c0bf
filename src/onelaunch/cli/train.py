"""`onelaunch train`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from onelaunch.cli.common import Debug, Quiet, log, program
from onelaunch.config import PRESETS
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
            help="auto, reference (PyTorch), cpu (compiled for this processor), or coreml: layers "
            "as ML Programs, by Core ML on a Mac, elsewhere evaluated.",
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
    from onelaunch.training.recipe import Recipe, parse_setting
    from onelaunch.training.train import train as train_run

    settings: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise BadInput(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
        settings["model.preset"] = preset
    if data is not None:
        settings["data.path"] = data
    for text in set_ or []:
        try:
            key, value = parse_setting(text)
        except BadInput as error:
            raise BadInput(f"--set {error}") from None
        settings[key] = value
    options = {
        "train.accum": accum,
        "train.device": device,
        "train.engine": engine,
        "coreml.compile_budget": compile_budget,
    }
    settings |= {key: value for key, value in options.items() if value is not None}
    named = recipe if recipe is not None or preset is None else Recipe()
    with _settings_as_options(options):
        outcome = train_run(named, run, settings, resume, quiet, lambda line: log(line, quiet))
    run = outcome.run
    if outcome.restart_requested:
        _go_on(run, quiet)
    at, folder = outcome.progress, shlex.quote(str(run))
    where = f"update {at.update}" + (f" and {at.micro} micro-steps" if at.micro else "")
    if outcome.signal is not None:
        log(f"stopped; saved at {where}; continue: {program()} train --resume --run {folder}")
        return 128 + outcome.signal
    best = ""
    if at.best_val_loss is not None:
        best = f"; best validation loss {at.best_val_loss:.4f} at update {at.best_update}"
    log(f"done: {where}{best}", quiet)
    log(f"run folder: {run}", quiet)
    log("next:", quiet)
    log(f"  {program()} generate {folder}", quiet)
    log(f"  {program()} eval {folder} --data {shlex.quote(outcome.recipe.data.path)}", quiet)
    log(f"  {program()} export {folder} model.bin --format llama2c", quiet)
    return 0


@contextlib.contextmanager
def _settings_as_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Name the option by which a setting was given, in the messages that name settings."""
    from onelaunch.training.train import SETTINGS

    try:
        yield
    except BadInput as error:
        head, colon, message = str(error).partition(": ")
        if not colon or head != SETTINGS:
            raise
        keys = [key for key, value in options.items() if value is not None and key in message]
        option = f"--{keys[0].partition('.')[2].replace('_', '-')}" if keys else "--set"
        raise BadInput(f"{option}: {message}") from error


def _go_on(run: Path, quiet: bool) -> None:
    """Have a fresh process continue this run, in this one's place."""
    import os
    import sys

    from onelaunch.compilation.environment import child_environment
    from onelaunch.training.train import resume_command

    log("as many compilations as the budget has: a fresh process goes on", quiet)
    sys.stdout.flush()
    sys.stderr.flush()
    command = resume_command(run, quiet)
    os.execve(sys.executable, command, child_environment())
