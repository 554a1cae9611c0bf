"""`onelaunch chat`: a conversation with a model."""

from __future__ import annotations

from typing import Annotated

import typer

from onelaunch.cli.chat_session import ChatSession, Notices
from onelaunch.cli.common import Debug, Device, Quiet, load_model
from onelaunch.cli.options import (
    Dtype,
    EngineName,
    FrequencyPenalty,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    Threads,
    TokenizerFile,
    TopK,
    TopP,
)


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A .bin or .gguf file, a Hugging Face folder or a run folder."
        ),
    ],
    tokenizer: TokenizerFile = None,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = "",
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="Of an answer, at most."),
    ] = 1024,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="S",
            help="The same seed and conversation draw the same answer again, also where no seed "
            "is given.",
        ),
    ] = 0,
    engine: EngineName = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Talk with a model.

    Each line is a message; /help lists commands. Ctrl-C ends an answer. Answers go to standard
    output, everything else to standard error. Without a terminal each line of standard input is a
    message.
    """
    from onelaunch.api import LanguageModel
    from onelaunch.generation.options import GenerateOptions

    loaded = load_model(model, offers_random=False)
    notices = Notices(quiet)
    how = {"device": device, "dtype": dtype, "threads": threads}
    options = GenerateOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, seed=seed,
    )  # fmt: skip
    with LanguageModel(loaded, engine, how, tokenizer, notices) as opened:
        session = ChatSession(opened, options, system, notices)
        loaded.weights, loaded.extras = {}, {}  # the engine has what it needs of them
        session.run()
