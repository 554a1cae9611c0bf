"""What every engine asks of its input, and says where the result is no number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput, RunFailed


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], n: int) -> None:
    """Raise BadInput unless each prompt has a token, fits the context, and stays in the vocabulary,
    and n is not negative."""
    if n < 0:
        raise BadInput(f"{n} new tokens: must not be negative")
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1}"
        if not prompt:
            raise BadInput(f"{name} is empty; it needs one token at least, such as BOS")
        if len(prompt) > config.max_seq_len:
            raise BadInput(
                f"{name} has {len(prompt)} tokens, the model's context holds {config.max_seq_len}; "
                "shorten the prompt"
            )
        _check_range(config, min(prompt), max(prompt), name)


def check_tokens(config: ModelConfig, tokens_BS: Tensor) -> None:
    """Raise BadInput for more positions than the context or an id beyond the vocabulary. Ids that
    lie on a GPU are waited for."""
    check_length(config, tokens_BS)
    if tokens_BS.numel():
        _check_range(config, int(tokens_BS.min()), int(tokens_BS.max()), "the tokens")


def check_length(config: ModelConfig, tokens_BS: Tensor) -> None:
    """Raise BadInput for more positions than the context."""
    length = tokens_BS.shape[1]
    if length > config.max_seq_len:
        raise BadInput(f"{length} tokens do not fit the model's context of {config.max_seq_len}")


def _check_range(config: ModelConfig, least: int, largest: int, name: str) -> None:
    wrong = least if least < 0 else largest
    if not 0 <= wrong < config.vocab_size:
        raise outside_vocabulary(config, wrong, name)


def outside_vocabulary(config: ModelConfig, token: int, name: str) -> BadInput:
    """The error for an id that the model has no embedding for."""
    return BadInput(
        f"{name}: id {token} is outside the model's vocabulary of {config.vocab_size}; "
        "is this the model's own tokenizer?"
    )


def not_finite(position: int, dtype: str) -> RunFailed:
    """The error for logits that are not finite."""
    mend = "the weights are damaged"
    if dtype != "float32":
        mend += f" or too large for {dtype}; try float32"
    return RunFailed(f"the logits at position {position} are not finite numbers: {mend}")
