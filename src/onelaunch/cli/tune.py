"""`onelaunch tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from onelaunch.cli.common import (
    Debug,
    Device,
    Json,
    ModelArgument,
    Quiet,
    load_model,
    log,
    progress_line,
)


def tune(
    model: ModelArgument,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, help="How many sequences at once.")
    ] = 1,
    sequence: Annotated[
        int | None,
        typer.Option(
            "--seq",
            metavar="N",
            min=1,
            help="How many tokens each; default: the model's context, 2,048 at most.",
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
    """
    import json

    from onelaunch.api import LanguageModel

    how = {"device": device, "dtype": dtype}
    with (
        LanguageModel(load_model(model, random), how=how, log=log) as opened,
        progress_line(quiet) as show,
    ):
        tuned = opened.tune(
            batch, sequence, progress=lambda phase, done, total: show(f"{phase}: {done} of {total}")
        )
    if json_:
        print(json.dumps(tuned))
        return
    width = max(map(len, tuned["us"]))
    for form, us in sorted(tuned["us"].items(), key=lambda pair: float(pair[1])):
        print(f"{form:<{width}}  {us:9.1f} us{'  chosen' if form == tuned['form'] else ''}")
    log(
        f"{tuned['batch']}x{tuned['sequence']} tokens: {tuned['tried']} forwards timed in "
        f"{tuned['seconds']:.0f} s",
        quiet,
    )
