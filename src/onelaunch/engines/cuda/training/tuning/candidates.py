"""The values of a training step's forms that are worth timing."""

from __future__ import annotations

from typing import Any

import torch

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.training.forms import (
    FEW_ROWS,
    FEW_ROWS_BACK,
    MANY_ROWS,
    MULTIPROCESSORS,
    AttentionBlocks,
    ctas,
    has_own_attention,
    next_power_of_2,
    rule,
)
from onelaunch.plan.training import logit_rows

FEW_CTAS = 4 * MULTIPROCESSORS
"""With fewer CTAs of 64 rows, blocks of 32 and 16 rows are worth timing."""
_LOGITS = (1 << 27, 1 << 28, 1 << 29)

Candidates = dict[str, list[Any]]


def candidates(
    config: ModelConfig, sequences: int, length: int, dtype: torch.dtype, fuses: bool
) -> Candidates:
    """Return the values of each form by name, the rule's first; `fuses` as for `rule`."""
    c, tokens = config, sequences * length
    first = rule(c, sequences, length, dtype, fuses)
    values: Candidates = {}
    if fuses:
        values["swiglu_forward"] = [first.swiglu_forward, MANY_ROWS, FEW_ROWS, None]
        values["swiglu_backward"] = [first.swiglu_backward, FEW_ROWS_BACK, None]
    if has_own_attention(c, dtype):
        shape = sequences, length, c.n_heads, c.head_dim
        values["attention_forward"] = [first.attention_forward, *_attention_forward(*shape)]
        values["attention_backward"] = [first.attention_backward, *_attention_backward(*shape)]
    by_rows = {logit_rows(tokens, c.vocab_size, logits): logits for logits in _LOGITS}
    by_rows[logit_rows(tokens, c.vocab_size, first.logits)] = first.logits
    values["logits"] = [first.logits, *by_rows.values()]
    values["side_stream"] = [first.side_stream, not first.side_stream]
    return {name: list(dict.fromkeys(each)) for name, each in values.items()}


def _attention_forward(
    sequences: int, length: int, n_heads: int, head_dim: int
) -> list[AttentionBlocks]:
    blocks = [(64, 64, 2, 4), (64, 64, 3, 4), (64, 32, 3, 4), (128, 64, 3, 8)]
    if sequences * n_heads * ctas(length, 64) < FEW_CTAS:
        blocks += [(32, 64, 2, 4), (16, 64 if head_dim > 64 else 128, 2, 4)]
    return _within(blocks, length)


def _attention_backward(
    sequences: int, length: int, n_heads: int, head_dim: int
) -> list[AttentionBlocks]:
    wide = head_dim > 64
    warps = 8 if wide else 4
    blocks = [(64, 32, 3, warps), (64, 64, 2, warps), (64, 32, 2, warps)]
    if sequences * n_heads * ctas(length, 64) < FEW_CTAS:
        blocks += [(32, 32, 2, warps), (16, 64 if wide else 128, 2, 4)]
    return _within(blocks, length)


def _within(blocks: list[tuple[int, int, int, int]], length: int) -> list[AttentionBlocks]:
    """Those whose rows a sequence fills, with no more columns than it has."""
    whole = max(16, next_power_of_2(length))
    return [
        AttentionBlocks(rows, min(columns, whole), stages, warps)
        for rows, columns, stages, warps in blocks
        if rows <= whole
    ]
