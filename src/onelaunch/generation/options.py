"""The keyword arguments of `LanguageModel.generate` and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from onelaunch.engines.engine import Sampling, bias_pairs
from onelaunch.generation.decode import Limits


class GenerateOptions(TypedDict, total=False):
    """How a text is generated; what is left out has the default of `limits`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    stop: str | Sequence[str]
    stop_ids: Sequence[int]


def limits(
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.9,
    min_p: float = 0.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = (),
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Limits:
    """The options with their defaults. Raises BadInput for a number out of range."""
    sampling = Sampling(
        temperature, top_k, top_p, min_p, seed, repetition_penalty, presence_penalty,
        frequency_penalty, bias_pairs(logit_bias),
    )  # fmt: skip
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return Limits(max_new_tokens, sampling, stop_ids, stops)
