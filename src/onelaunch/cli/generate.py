"""`onelaunch generate`: text out of a model, as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onelaunch.cli.common import Debug, Device, Json, ModelArgument, Quiet, load_model, log
from onelaunch.cli.options import (
    Dtype,
    EngineName,
    FrequencyPenalty,
    LogitBias,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    Threads,
    TokenizerFile,
    TopK,
    TopP,
)
from onelaunch.cli.output import Output, as_json, summary
from onelaunch.cli.prompts import read_prompts
from onelaunch.cli.timeline import traced_device, write_timeline
from onelaunch.errors import BadInput


def generate(
    model: ModelArgument,
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    tokenizer: TokenizerFile = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT|@FILE|-",
            help="How the text begins: itself, a file, or - for standard input; a byte order mark "
            "and one final line end of a file are dropped. May be given several times. Without it "
            "the text begins at BOS, or at EOS where the model has no BOS.",
        ),
    ] = None,
    no_echo: Annotated[
        bool, typer.Option("--no-echo", help="The continuation alone, without the prompt.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The most tokens to add.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", help="Ends the text before it. May be given several times."
        ),
    ] = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="S",
            help="The same seed and prompt draw the same text again, also where no seed is given; "
            "a prompt given twice draws two.",
        ),
    ] = 0,
    engine: EngineName = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    fusion_depth: Annotated[
        str,
        typer.Option(
            "--fusion-depth",
            metavar="DEPTH",
            help="What one call holds: auto (many tokens), stage, half, a number of layers, "
            "all (one forward) or, on a GPU, text (many tokens).",
        ),
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="On an NVIDIA GPU, write when each tile of one forward ran, for ui.perfetto.dev: "
            "of the prompts, or without one of a whole context, in one launch unless "
            "--fusion-depth says how many; with --fusion-depth text, of a token.",
        ),
    ] = None,
    ids: Annotated[
        bool,
        typer.Option("--ids", help="Token ids instead of text, without BOS and the final stop id."),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write text.

    The prompt, if any, and its continuation go to standard output as they come.
    """
    texts = read_prompts(prompt or [])
    bias = [bias_of(text) for text in logit_bias or ()]
    traced = None if trace is None else traced_device(device)

    from onelaunch.api import LanguageModel

    loaded = load_model(model, random)
    out = Output(echo=not no_echo, ids=ids, quiet=quiet)
    how = {"device": device, "dtype": dtype, "threads": threads, "fusion_depth": fusion_depth}
    with LanguageModel(loaded, engine, how, tokenizer, out.notice) as opened:
        decoding = opened.decode(
            texts or [""], max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            logit_bias=bias, seed=seed, stop=stop or (), ids_only=ids,
        )  # fmt: skip
        if trace is not None and traced is not None:
            written = [each.prompt.ids for each in decoding.completions] if texts else []
            log(write_timeline(trace, loaded, written, traced, dtype, fusion_depth), quiet)
        loaded.weights, loaded.extras = {}, {}  # the engine has what it needs of them
        if json_:
            decoding.finish()
            print(as_json(model, opened, decoding))
        else:
            out.write(decoding)
        log(summary(opened, decoding), quiet)


def bias_of(text: str) -> tuple[int, float]:
    """The token id and the amount of `--logit-bias`, such as 403=-100. Raises BadInput."""
    token, _, amount = text.partition("=")
    try:
        return int(token), float(amount)
    except ValueError as error:
        raise BadInput(f"--logit-bias {text}: must be ID=X, such as 403=-100") from error
