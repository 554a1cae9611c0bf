"""Input checks that all engines share, and the error for logits that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.engine import MAX_TOP_LOGPROBS, Request, Sampling
from onelaunch.errors import BadInput, RunFailed
from onelaunch.plan import unplanned

TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def not_computed(config: ModelConfig) -> str | None:
    """Why an engine of the layers of Llama and Qwen3 alone does not run a model; None where it
    does."""
    return f"it does not compute {config.extensions[0]}" if config.extensions else None


def not_planned(config: ModelConfig) -> str | None:
    """Why an engine of all stages of plans does not run a model; None where it does."""
    reason = unplanned(config)
    return reason and f"it does not compute {reason}"


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raise BadInput, which names it, for a prompt that `check_prompt` refuses."""
    for index, prompt in enumerate(prompts):
        check_prompt(config, prompt, f"prompt {index + 1}")


def check_prompt(config: ModelConfig, prompt: Sequence[int], name: str) -> None:
    """Raise BadInput unless a prompt is a list of ids, has a token, fits the context, and stays in
    the vocabulary."""
    if not isinstance(prompt, Sequence) or not _are_ids(prompt):
        raise BadInput(
            f"{name}: must be a list of token ids, such as [1, 403], not {_kind(prompt)}"
        )
    if not prompt:
        raise BadInput(f"{name} is empty; it needs one token at least, such as BOS")
    if len(prompt) > config.max_seq_len:
        raise BadInput(
            f"{name} has {len(prompt)} tokens, the model's context holds {config.max_seq_len}; "
            "shorten the prompt"
        )
    _check_range(config, min(prompt), max(prompt), name)


def _are_ids(prompt: Sequence[int]) -> bool:
    # almost all prompts have Python's own numbers, and a long one is looked through at once
    return set(map(type, prompt)) <= {int} or all(isinstance(id_, Integral) for id_ in prompt)


def check_max_new_tokens(n: int) -> None:
    """Raise BadInput for a negative number of tokens."""
    if n < 0:
        raise BadInput(f"max_new_tokens={n}: must not be negative")


def check_request(config: ModelConfig, request: Request) -> None:
    """Raise BadInput for a request that cannot be met; see `Session.submit`."""
    check_max_new_tokens(request.max_new_tokens)
    check_prompt(config, request.prompt_ids, f"the prompt of request {request.id}")
    check_sampling(config, request.sampling)
    check_top_logprobs(request.top_logprobs)


def check_sampling(config: ModelConfig, sampling: Sampling) -> None:
    """Raise BadInput for a logit bias of a token that the model does not have."""
    for token, _ in sampling.logit_bias:
        if not 0 <= token < config.vocab_size:
            raise outside_vocabulary(config, token, f"logit_bias={token}")


def check_top_logprobs(n: int) -> None:
    """Raise BadInput for a number of most likely tokens out of range."""
    if not 0 <= n <= MAX_TOP_LOGPROBS:
        raise BadInput(f"top_logprobs={n}: must be from 0 to {MAX_TOP_LOGPROBS}")


def check_session(max_batch: int, max_len: int | None, config: ModelConfig) -> int:
    """The positions that a session keeps of a request; raises BadInput for less than one, and for
    a batch of less than one."""
    if max_batch < 1:
        raise BadInput(f"max_batch={max_batch}: must be at least 1")
    if max_len is not None and max_len < 1:
        raise BadInput(f"max_len={max_len}: must be at least 1")
    return config.max_seq_len if max_len is None else min(max_len, config.max_seq_len)


def check_tokens(config: ModelConfig, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """The tokens as `token_tensor` returns them. Raises BadInput also for an id beyond the
    vocabulary, for which it waits for the tensor's device."""
    tokens_BS = token_tensor(config, tokens)
    if tokens_BS.numel():
        _check_range(config, int(tokens_BS.min()), int(tokens_BS.max()), "the tokens")
    return tokens_BS


def token_tensor(config: ModelConfig, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Token ids as an integer tensor (B, S): `tokens` itself, or one made of lists of equal length.

    Raises BadInput for another shape, for what holds no integers, and for more positions than the
    context. The ids themselves are not read.
    """
    tokens_BS = tokens if isinstance(tokens, Tensor) else _from_lists(tokens)
    shape, dtype = tuple(tokens_BS.shape), tokens_BS.dtype
    if tokens_BS.dim() != 2:
        mend = ""
        if tokens_BS.dim() == 1:
            mend = "; for one sequence: tokens[None], which is (1, sequence)"
        raise BadInput(f"tokens of shape {shape}: must be (batch, sequence){mend}")
    if dtype not in TOKEN_DTYPES:
        raise BadInput(
            f"tokens of {str(dtype).removeprefix('torch.')}: token ids must be integers, "
            "such as torch.int64"
        )
    if shape[1] > config.max_seq_len:
        raise BadInput(f"{shape[1]} tokens do not fit the model's context of {config.max_seq_len}")
    return tokens_BS


def _from_lists(tokens: Sequence[Sequence[int]]) -> Tensor:
    try:
        tensor = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadInput(
            "tokens: must be a tensor (batch, sequence) of token ids, or lists of as many each; "
            f"pad sequences of different lengths ({str(error).splitlines()[0]})"
        ) from error
    return tensor if tensor.numel() else tensor.long()


def last_positions(
    tokens_BS: Tensor, last: bool, lengths: Sequence[int] | None
) -> list[int] | None:
    """The position of each sequence whose logits are wanted; None where those of all are. Raises
    BadInput; see `LogitsEngine.logits`."""
    batch, sequence = tokens_BS.shape
    if not last:
        if lengths is not None:
            raise BadInput("lengths: need last=True; without it the logits of all positions come")
        return None
    if lengths is None:
        if batch and not sequence:
            raise BadInput("last=True: sequences without a token have no last position")
        return [sequence - 1] * batch
    counts = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    whole = all(isinstance(n, Integral) for n in counts)
    if len(counts) != batch or not whole or not all(1 <= n <= sequence for n in counts):
        raise BadInput(f"lengths={counts}: must be {batch} whole numbers from 1 to {sequence}")
    return [int(n) - 1 for n in counts]


def _kind(prompt: object) -> str:
    """The kind of value in place of a list of ids, for messages."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        wrong = next(each for each in prompt if not isinstance(each, Integral))
        return f"of {type(wrong).__name__}"
    mend = ": use tolist()" if hasattr(prompt, "tolist") else ""
    return f"{type(prompt).__name__}{mend}"


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


def logits_dtype(dtype: torch.dtype | None, own: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype of the logits: `dtype`, by default float32. Raises BadInput for a dtype that is
    neither float32 nor the engine's own."""
    if dtype in (None, torch.float32, own):
        return dtype or torch.float32
    also = "" if own == torch.float32 else f" or {own}"
    raise BadInput(f"dtype={dtype}: this engine returns logits in torch.float32{also}")


def not_finite(position: int, dtype: str) -> RunFailed:
    """The error for logits that are not finite."""
    mend = "the weights are damaged"
    if dtype != "float32":
        mend += f" or too large for {dtype}; try float32"
    return RunFailed(f"the logits at position {position} are not finite numbers: {mend}")
