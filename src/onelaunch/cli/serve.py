"""`onelaunch serve`: a model behind an HTTP API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from onelaunch.cli.common import Debug, Device, ModelArgument, Quiet, load_model, log
from onelaunch.cli.options import Dtype, Threads, TokenizerFile
from onelaunch.errors import BadInput


def serve(
    model: ModelArgument,
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="0.0.0.0 to be reached from elsewhere.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: a free one.")
    ] = 8080,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            metavar="N",
            min=1,
            help="Sequences that grow at once; default: as many as the engine can.",
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue",
            metavar="N",
            min=0,
            help="Further ones that wait; then: 429.",
        ),
    ] = 256,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            min=2,
            help="Tokens of a prompt and its completion together; default: the model's context, "
            "at most 8,192.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", metavar="N", min=1, help="The most new tokens that a request gets."
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", help="Of requests that do not say; 0: greedy."),
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Of requests that do not say; 1: all.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="S", help="Of requests that do not say; default: a random one each."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The model's id; default: MODEL's file name."),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template", metavar="FILE", help="A Jinja file in place of the model's own."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="What requests must have as a bearer token; default: $ONELAUNCH_API_KEY, if set.",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors",
            metavar="ORIGIN",
            help="A web origin whose pages may use the server, or *. May be given several times.",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.001, help="Of a request, waiting included."
        ),
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            min=0,
            help="How long running requests may go on after SIGTERM or ctrl-C.",
        ),
    ] = 10.0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", metavar="ENGINE", help="auto, reference, cpu or cuda; see generate."
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    tokenizer: TokenizerFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with a page to chat on.

    It has OpenAI's API and llama.cpp's endpoints, described at /openapi.json. It ends with ctrl-C
    or SIGTERM.
    """
    from onelaunch.api import LanguageModel
    from onelaunch.checkpoints.atomic import read_bytes
    from onelaunch.engines.engine import Sampling
    from onelaunch.generation.server.run import Address, serve
    from onelaunch.generation.server.service import Limits, make_service

    key = api_key if api_key is not None else os.environ.get("ONELAUNCH_API_KEY") or None
    if key == "":
        raise BadInput("--api-key is empty; leave it out for none")
    template = None
    if chat_template is not None:
        raw = read_bytes(chat_template, 1 << 20, "a chat template")
        try:
            template = raw.decode()
        except UnicodeDecodeError:
            raise BadInput(f"{chat_template}: not UTF-8 text") from None
    address = Address(host, port, key, tuple(cors or ()), grace)
    defaults = Sampling(temperature, top_p=top_p)
    loaded = load_model(model, random)
    how = {"device": device, "dtype": dtype, "threads": threads}

    def note(line: str) -> None:
        log(line, quiet)

    with LanguageModel(loaded, engine, how, tokenizer, note) as opened:
        limits = Limits(context or 0, max_batch or 0, max_queue, max_new_tokens, timeout)
        service = make_service(
            loaded, opened.engine, opened.tokenizer, limits,
            name=name, template=template, defaults=defaults, seed=seed,
        )  # fmt: skip
        loaded.weights, loaded.extras = {}, {}  # the engine has what it needs of them
        serve(service, address, note)
