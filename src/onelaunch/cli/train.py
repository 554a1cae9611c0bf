"""`onelaunch train`."""

from __future__ import annotations

import contextlib
import json as json_module
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onelaunch.cli.common import Debug, Json, Quiet, log, program
from onelaunch.config import PRESETS
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from onelaunch.training.loop import Outcome


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or a built-in one: quickstart (the default), shakespeare-char, "
            "shakespeare-char-gpu.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="Train this shape.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="MODEL",
            help="Start from these weights: a .bin or .gguf file, a Hugging Face folder or a run "
            "folder; the text is prepared with its tokenizer.",
        ),
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
            help="auto, reference (PyTorch), cpu (compiled for this processor), cuda (CUDA graphs "
            "of an NVIDIA GPU), or coreml: layers as ML Programs, by Core ML on a Mac, elsewhere "
            "evaluated.",
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
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Show what would run, the memory it needs and about how long; train and write "
            "nothing.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a model, or continue a run.

    --json is for --plan.
    """
    from onelaunch.training.ranks import joined
    from onelaunch.training.recipe import Recipe, parse_setting
    from onelaunch.training.train import plan as plan_run
    from onelaunch.training.train import train as train_run

    with joined() as ranks:
        quiet = quiet or not ranks.writes
        settings: dict[str, Any] = {}
        if preset is not None:
            if preset not in PRESETS:
                raise BadInput(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
            settings["model.preset"] = preset
        if init == "":
            raise BadInput("--init: is empty; give a file or a folder")
        if init is not None:
            settings["train.init"] = init
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
        if json and not plan:
            raise BadInput("--json: is for --plan; leave it out")
        if resume and plan:
            raise BadInput("--plan: shows a new run; leave out --resume")
        if plan:
            with _settings_as_options(options):
                facts = plan_run(named, settings)
            if ranks.writes:
                print(json_module.dumps(facts) if json else _plan_text(facts))
            return 0
        with _settings_as_options(options):
            outcome = train_run(
                named, run, settings, resume, quiet, lambda line: log(line, quiet), ranks
            )
        return _report(outcome, quiet, silent=not ranks.writes)


def _report(outcome: Outcome, quiet: bool, silent: bool) -> int:
    """Say how a run ended, and what can be done with it; returns the exit code."""
    run = outcome.run
    if outcome.restart_requested:
        _go_on(run, quiet)
    at, folder = outcome.progress, shlex.quote(str(run))
    where = f"update {at.update}" + (f" and {at.micro} micro-steps" if at.micro else "")
    if outcome.signal is not None:
        log(
            f"stopped; saved at {where}; continue: {program()} train --resume --run {folder}",
            silent,
        )
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


def _plan_text(facts: dict[str, Any]) -> str:
    """What would run, as aligned lines."""
    from onelaunch.training.display import format_duration
    from onelaunch.training.memory import format_bytes

    model, memory, accum = facts["model"], facts["memory"], facts["accum"]
    size = {name: format_bytes(n) for name, n in memory.items() if n is not None}
    epochs = "" if facts["epochs"] is None else f", {facts['epochs']:.3g} times the data"
    free = f" of {size['available_bytes']} free" if "available_bytes" in size else ""
    rows = {
        "model": f"{facts['parameters'] / 1e6:.2f} million parameters: dim {model['dim']}, "
        f"{model['n_layers']} layers, {model['n_heads']} heads, vocabulary {model['vocab_size']}",
        "weights": facts["init"] or f"random, seed {facts['seed']}",
        "data": facts["data"],
        "updates": f"{facts['updates']:,}, each {accum} micro-step{'s' if accum > 1 else ''} of "
        f"{facts['batch_size']} x {facts['seq_len']} = {facts['tokens_per_update']:,} tokens; "
        f"{facts['tokens']:,} tokens in all{epochs}",
        "optimizer": f"{facts['optimizer']}, learning rate {facts['schedule']} from "
        f"{facts['peak_lr']:g}",
        "engine": f"{facts['engine']} on {facts['device']}"
        + (f" in {facts['dtype']}" if facts["dtype"] else ""),
        "memory": f"at least {size['total_bytes']}{free}: weights {size['weight_bytes']}, "
        f"gradients {size['gradient_bytes']}, optimizer {size['optimizer_bytes']}, activations of "
        f"a batch {size['activation_bytes']}",
        "compute": f"{facts['flops']:.3g} floating-point operations",
    }
    if facts["misfit"] is not None:
        rows["misfit"] = facts["misfit"]
    elif facts["seconds"] is None:
        rows["time"] = "not measured: it would compile first"
    else:
        rows["time"] = (
            f"about {format_duration(facts['seconds'])}, {facts['seconds_per_update']:.3g} s an "
            f"update (measured: {facts['measured_sequences']} sequences), without evaluations and "
            "checkpoints"
        )
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


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
