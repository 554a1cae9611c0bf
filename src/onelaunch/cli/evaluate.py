"""`onelaunch eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from onelaunch.cli.common import (
    Debug,
    Device,
    Json,
    Quiet,
    load_model,
    log,
    progress_line,
)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A .bin or .gguf file, a Hugging Face folder or a run folder."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DIR", help="A folder made by `onelaunch prepare`, or: stories."
        ),
    ],
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="auto, reference (PyTorch), cpu, cuda or coreml; auto is cuda on an NVIDIA GPU, "
            "reference elsewhere.",
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16."),
    ] = "float32",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the loss on the validation split.

    The whole split, in non-overlapping windows of the model's context, 2,048 at most.
    """
    from onelaunch.api import LanguageModel

    loaded = load_model(model, offers_random=False)
    how = {"device": device, "dtype": dtype}
    opened = LanguageModel(loaded, engine, how, log=lambda line: log(line, quiet))
    with progress_line(quiet) as show:
        result = opened.evaluate(data, show)
    if json_:
        print(json.dumps(asdict(result) | {"perplexity": result.perplexity}))
        return
    print(f"validation loss {result.loss:.4f} nats per token")
    print(f"perplexity      {result.perplexity:.3f}")
    if result.nats_per_byte is not None:
        print(f"per byte        {result.nats_per_byte:.4f} nats")
    log(
        f"{result.tokens:,} tokens of {result.data}, in non-overlapping windows of {result.window}",
        quiet,
    )
