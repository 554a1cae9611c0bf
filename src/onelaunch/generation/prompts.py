"""Encode prompts: text to token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from onelaunch.checkpoints.tokenizers import JsonTokenizer, Tokenizer, check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a sequence. `ids` includes BOS if the model needs one: the first `special`
    ids are not part of `text`."""

    text: str
    ids: Sequence[int]
    special: int = 0


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], config: ModelConfig | None = None
) -> list[Prompt]:
    """Encode texts to prompts, BOS included.

    Raises BadInput, naming the piece, if a text has an id outside the vocabulary of `config`.
    """
    encoded = [(text, tokenizer.encode(text)) for text in texts]
    prompts = [Prompt(text, ids, int(ids[:1] == [tokenizer.bos_id])) for text, ids in encoded]
    if config is not None:
        for index, prompt in enumerate(prompts):
            check_ids(tokenizer, prompt.ids, config, f"prompt {index + 1}")
    return prompts


def empty_prompt(model: LoadedModel, tokenizer: Tokenizer | None) -> Prompt:
    """Return the prompt of a sequence without one: its first id. Raises BadInput if unknown."""
    first = first_id(model, tokenizer)
    if first is None:
        source = model.source or "the model"
        raise BadInput(f"{source}: the model has no BOS to start from; pass prompt='TEXT'")
    return Prompt("", [first], 1)


def first_id(model: LoadedModel, tokenizer: Tokenizer | None) -> int | None:
    """Return the first id of a sequence without a prompt: BOS, or else EOS, as after a previous
    document; None if the model and the tokenizer name neither."""
    candidates = [model.bos_id]
    if tokenizer is not None:
        candidates += [tokenizer.bos_id, tokenizer.eos_id]
    return next((token for token in candidates if token is not None), None)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text in which the special tokens are written, such as a rendered chat template.

    BOS comes first where the tokenizer adds one, and once only where the text begins with it.
    """
    if isinstance(tokenizer, JsonTokenizer):  # reads special tokens itself
        ids = tokenizer.encode(text)
    else:
        ids = list(tokenizer.encode(""))
        special = tokenizer.special_tokens
        pattern = "|".join(map(re.escape, special))
        for piece in re.split(f"({pattern})", text) if pattern else [text]:
            ids += [special[piece]] if piece in special else tokenizer.encode(piece, bos=False)
    return ids[1:] if begins_twice(tokenizer, ids) else ids


def begins_twice(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether `tokenizer` adds BOS to a text, and the text of `ids` had one already."""
    bos = tokenizer.bos_id
    return bos is not None and list(ids[:2]) == [bos, bos] and tokenizer.encode("a")[0] == bos
