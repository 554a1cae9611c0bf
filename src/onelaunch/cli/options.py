"""Options of the commands that generate text."""

from __future__ import annotations

from typing import Annotated

import typer

TokenizerFile = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="FILE", help="Where none lies next to the model."),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", metavar="T", help="0 takes the most likely token each time."),
]
TopK = Annotated[
    int, typer.Option("--top-k", metavar="K", help="Draw among the K most likely; 0: all.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="P", help="Draw among the likeliest that add up to P; 1: all."),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", metavar="P", help="Draw among those P times as likely as the best; 0: all."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Above 1, tokens of the prompt and of the text so far become less likely, "
        "below 1 more likely; 1: neither.",
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        help="Subtracted from the logit of each token of the new text so far, -2 to 2.",
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        "--frequency-penalty",
        metavar="X",
        help="The same for each time that the token is there, -2 to 2.",
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=X",
        help="Added to the logit of a token; -100 bans it. May be given several times.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="auto, reference (PyTorch), cpu (compiled: one call for many tokens), "
        "cuda (many tokens a launch) or coreml (ML Programs, by Core ML on a Mac, "
        "elsewhere evaluated, for checking); auto is the device's own.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16; default: bfloat16 on a CUDA GPU and float32 elsewhere.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="CPU threads; default: as many as measure fastest (reference engine: "
        "PyTorch's choice).",
    ),
]
