"""Prompts: text to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onelaunch.checkpoints.tokenizers import Tokenizer, check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a sequence begins with. `ids` holds BOS where the model wants one: the first `special`
    of them are not of the text."""

    text: str
    ids: Sequence[int]
    special: int = 0


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], config: ModelConfig | None = None
) -> list[Prompt]:
    """The texts with their token ids, BOS included.

    Raises BadInput, naming the piece, where a text needs an id that the model of `config` lacks.
    """
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    prompts = [Prompt(text, ids, int(ids[:1] == [tokenizer.bos_id])) for text, ids in encoded]
    if config is not None:
        for index, prompt in enumerate(prompts):
            check_ids(tokenizer, prompt.ids, config, f"prompt {index + 1}")
    return prompts


def empty_prompt(model: LoadedModel, tokenizer: Tokenizer | None) -> Prompt:
    """What a sequence without a prompt begins with. Raises BadInput where that is not known."""
    first = first_id(model, tokenizer)
    if first is None:
        source = model.source or "the model"
        raise BadInput(f"{source}: the model names no BOS to begin with; give prompt='TEXT'")
    return Prompt("", [first], 1)


def first_id(model: LoadedModel, tokenizer: Tokenizer | None) -> int | None:
    """The id that a sequence without a prompt begins with: BOS, or the EOS of the text before it;
    None where neither is named."""
    named = [model.bos_id]
    if tokenizer is not None:
        named += [tokenizer.bos_id, tokenizer.eos_id]
    return next((token for token in named if token is not None), None)
