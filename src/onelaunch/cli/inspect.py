"""`onelaunch inspect`: what a model is, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onelaunch.cli.common import Json, ModelArgument, say
from onelaunch.errors import MissingExtra

if TYPE_CHECKING:
    from onelaunch.checkpoints.weights import LoadedModel


def inspect(
    model: ModelArgument,
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a model's configuration and size."""
    import json as json_module

    from onelaunch.checkpoints import load, random_model

    facts = _facts(model, random_model(model) if random else load(model))
    if json:
        print(json_module.dumps(facts))
        return
    config = facts.pop("config")
    if facts["tokenizer"] is not None:
        facts["tokenizer"] = "{kind}, {vocab_size:,} tokens".format(**facts["tokenizer"])
    width = max(map(len, [*facts, *config]))
    for name, value in [*facts.items(), *config.items()]:
        print(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")


def _facts(name: str, loaded: LoadedModel) -> dict[str, Any]:
    from onelaunch.checkpoints.tokenizers import find_tokenizer

    try:
        tokenizer = find_tokenizer(loaded)
    except MissingExtra as error:
        tokenizer = None
        say(f"the tokenizer cannot be read: {error}")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in loaded.weights.values()}
    return {
        "model": name,
        "format": loaded.format,
        "parameters": loaded.config.n_params,
        "bytes": loaded.n_bytes,
        "dtype": ", ".join(sorted(dtypes)),
        "tokenizer": None
        if tokenizer is None
        else {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "bos_id": loaded.bos_id,
        "stop_ids": list(loaded.stop_ids),
        "config": loaded.config.to_dict(),
    }


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
