"""`onelaunch tune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from onelaunch.cli.common import (
    Debug,
    Device,
    Json,
    ModelArgument,
    Quiet,
    batch_shape,
    load_model,
    log,
    progress_line,
)
from onelaunch.errors import BadInput


def tune(
    model: ModelArgument,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="How many sequences at once; default: 1."),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(
            "--seq",
            metavar="N",
            min=1,
            help="How many tokens each; default: the model's context, 2,048 at most.",
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            "--training",
            metavar="BxS",
            help="Tune a training step of exactly B sequences of S tokens, such as 64x256.",
        ),
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; its shape is tuned for.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="bfloat16 (the default) or float16."),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the fastest launches on this GPU, once.

    Measures fusion depths and tiles and keeps the answer. Logits of whole sequences use it from
    then on, in every process, for the same shape of model, dtype, GPU and versions, and for every
    batch and sequence up to the next powers of two. Without it a rule decides. It takes some tens
    of seconds; nothing else should use the GPU meanwhile.

    With --training it measures the tiles, the logits at once and the streams of a training step,
    and `onelaunch train` uses the answer for the same batch, without dropout.
    """
    import json

    from onelaunch.api import LanguageModel

    how = {"device": device, "dtype": dtype}
    shape = batch or 1, sequence
    if training is not None:
        if batch is not None or sequence is not None:
            raise BadInput(
                f"--training {training}: has batch and sequence; leave out --batch, --seq"
            )
        shape = batch_shape(training)
    with (
        LanguageModel(load_model(model, random), how=how, log=log) as opened,
        progress_line(quiet) as show,
    ):
        tuned = opened.tune(
            *shape,
            training=training is not None,
            progress=lambda phase, done, total: show(f"{phase}: {done} of {total}"),
        )
    if json_:
        print(json.dumps(tuned))
    elif training is not None:
        _print_training(tuned, quiet)
    else:
        _print_forward(tuned, quiet)


def _print_forward(tuned: dict[str, Any], quiet: bool) -> None:
    width = max(map(len, tuned["us"]))
    for form, us in sorted(tuned["us"].items(), key=lambda pair: float(pair[1])):
        print(f"{form:<{width}}  {us:9.1f} us{'  chosen' if form == tuned['form'] else ''}")
    log(
        f"{tuned['batch']}x{tuned['sequence']} tokens: {tuned['tried']} forwards timed in "
        f"{tuned['seconds']:.0f} s",
        quiet,
    )


def _print_training(tuned: dict[str, Any], quiet: bool) -> None:
    """A line for each value of each form: microseconds of a micro-step with it, or why it does not
    run."""
    lines = [(each["form"].replace("_", " "), each["value"], each) for each in tuned["timed"]]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    for form, value, each in lines:
        figure = f"does not run: {each['why']}" if each["us"] is None else f"{each['us']:9.1f} us"
        chosen = "  chosen" if each["chosen"] else ""
        print(f"{form:<{widths[0]}}  {value:<{widths[1]}}  {figure}{chosen}")
    log(
        f"{tuned['batch']}x{tuned['sequence']} tokens: {tuned['us']:.1f} us a micro-step, "
        f"{tuned['rule_us']:.1f} by the rule; {tuned['tried']} timed in {tuned['seconds']:.0f} s",
        quiet,
    )
