"""Continuing texts: encode, generate, decode as the tokens come, and say how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onelaunch.checkpoints.tokenizers import Tokenizer, check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.engines.engine import Engine, Sampling

OnPiece = Callable[[int, int | None, str], None]
"""Called with (index of the prompt, new token id, text that it completes). Texts that grow together
come in turns. Each ends with a call whose id is None, its text what was left over."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a text begins with. `ids` holds BOS where the model wants one."""

    text: str
    ids: list[int]


@dataclass(slots=True)
class Completion:
    """A prompt and its continuation. `text` is None where there was no tokenizer.

    Seconds run from the beginning of all texts: to the first new token, and to the last.
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    text: str | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], config: ModelConfig | None = None
) -> list[Prompt]:
    """The texts with their token ids, BOS included.

    Raises BadInput, naming the piece, where a text needs an id that the model of `config` lacks.
    """
    prompts = [Prompt(text, tokenizer.encode(text)) for text in texts]
    if config is not None:
        for index, prompt in enumerate(prompts):
            check_ids(tokenizer, prompt.ids, config, f"prompt {index + 1}")
    return prompts


def first_id(model: LoadedModel, tokenizer: Tokenizer | None) -> int | None:
    """What a text without a prompt begins with: BOS, or the EOS of the text before it; None where
    neither is named."""
    named = [model.bos_id]
    if tokenizer is not None:
        named += [tokenizer.bos_id, tokenizer.eos_id]
    return next((token for token in named if token is not None), None)


def complete(
    engine: Engine,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    stop: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    on_piece: OnPiece | None = None,
) -> list[Completion]:
    """Continue each prompt by up to `n` tokens; `on_piece` hears of each as it is chosen.

    A character of several tokens is handed on when it is whole. Raises BadInput for an empty
    prompt, one beyond the model's context, or ids beyond its vocabulary, before any token.
    """
    completions = [Completion(prompt) for prompt in prompts]
    if not completions:
        return []
    report = on_piece or _nobody
    decoders = [_Decoder(tokenizer, prompt.ids) for prompt in prompts]
    start = time.perf_counter()

    def on_token(index: int, token: int) -> None:
        completion = completions[index]
        completion.seconds = time.perf_counter() - start
        if completion.first_token_seconds is None:
            completion.first_token_seconds = completion.seconds
        report(index, token, decoders[index].push(token))

    def on_end(index: int) -> None:
        report(index, None, decoders[index].finish())

    texts = engine.generate([prompt.ids for prompt in prompts], n, sampling, on_token, stop, on_end)
    for completion, decoder, ids in zip(completions, decoders, texts, strict=True):
        completion.ids = ids
        completion.text = None if tokenizer is None else decoder.text
    return completions


def tokens_per_second(completions: Sequence[Completion]) -> float | None:
    """New tokens of all texts per second, from the first of them to the last.

    The first, which reads a prompt, is left out. None where there are not two.
    """
    begun = [c for c in completions if c.first_token_seconds is not None]
    if not begun:
        return None
    tokens = sum(len(completion.ids) for completion in begun) - 1
    seconds = max(c.seconds for c in begun) - min(c.first_token_seconds or 0.0 for c in begun)
    return tokens / seconds if tokens and seconds > 0 else None


def _nobody(index: int, token: int | None, piece: str) -> None:
    pass


class _Decoder:
    """Decodes a continuation and keeps its text; silent without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: list[int]) -> None:
        self._stream = None if tokenizer is None else tokenizer.decoder()
        self._pieces: list[str] = []
        if self._stream is not None:
            for token in prompt_ids:  # so that it knows it is no longer at a text's beginning
                self._stream.push(token)

    def push(self, token: int) -> str:
        return "" if self._stream is None else self._keep(self._stream.push(token))

    def finish(self) -> str:
        return "" if self._stream is None else self._keep(self._stream.finish())

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        return "".join(self._pieces)
