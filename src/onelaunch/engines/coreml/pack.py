"""A model's weights as an ML Program has them: constants in float16, rows and columns of a 1x1
convolution, heads padded.

Of a head's queries and keys the rows that are the first of their rotary pair come first, for all
heads, and then the second ones: a rotation is then four products of halves of the channels,
whichever way the model pairs them. A head is padded with rows of zeros to a multiple of HEAD_STEP
elements: keys lie on the last axis once, and what is shorter there is padded by the Neural Engine.
The scores' 1 / sqrt(head width) is in the queries' weights, or in the weight of their norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.package import FLOAT16_MAX
from onelaunch.errors import BadInput
from onelaunch.model import rope_tables

HEAD_STEP = 32
MASKED = -4e4
"""Added to a score that is not to be seen: finite in float16, and its exp is 0."""

Array = np.ndarray


def padded_head(config: ModelConfig) -> int:
    """Elements of a head in a program."""
    return -(-config.head_dim // HEAD_STEP) * HEAD_STEP


def half_rows(config: ModelConfig, heads: int) -> Tensor:
    """Which row of a projection of queries or keys each row of the program's is, (heads * padded
    head,); -1 is a row of zeros."""
    E, half = config.head_dim, padded_head(config) // 2
    if config.rope_layout == "interleaved":
        first, second = torch.arange(0, E, 2), torch.arange(1, E, 2)
    else:
        first, second = torch.arange(E // 2), torch.arange(E // 2, E)
    starts = torch.arange(heads)[:, None] * E
    empty = torch.full((heads, half - E // 2), -1)
    return torch.cat([torch.cat((starts + rows, empty), 1).flatten() for rows in (first, second)])


def whole_rows(config: ModelConfig, heads: int) -> Tensor:
    """The same of values, heads one after another."""
    E = config.head_dim
    rows = torch.arange(heads * E).view(heads, E)
    empty = torch.full((heads, padded_head(config) - E), -1)
    return torch.cat((rows, empty), 1).flatten()


def taken(weight: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix or elements of a vector, zeros for -1."""
    taken_rows = weight[rows.clamp(min=0)]
    return taken_rows * (rows >= 0).view(-1, *[1] * (weight.dim() - 1))


def returned(packed: Tensor, rows: Tensor, count: int) -> Tensor:
    """The inverse of `taken`: what of `packed` belongs to each of `count` rows, added where several
    do."""
    there = rows >= 0
    result = packed.new_zeros(count, *packed.shape[1:])
    return result.index_add_(0, rows[there], packed[there])


class Packed:
    """The constants of a model's programs by their canonical names, made when requested."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self._weights = weights
        c = config
        self._rows = {
            "q_proj": half_rows(c, c.n_heads),
            "k_proj": half_rows(c, c.n_kv_heads),
            "v_proj": whole_rows(c, c.n_kv_heads),
            "o_proj": whole_rows(c, c.n_heads),
        }

    def unpacked(self, name: str) -> Tensor:
        """A weight as the model has it, float32, contiguous, on the CPU."""
        return self._weights[name].detach().float().cpu().contiguous()

    def __call__(self, name: str) -> Array:
        """The constant of a norm (1, C, 1, 1); of a projection (out, in, 1, 1); of the embedding
        (V, D). Raises BadInput where float16 does not hold it."""
        weight = self.unpacked(name)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        scale = self.config.head_dim**-0.5
        if kind in ("q_norm", "k_norm"):
            heads = self.config.n_heads if kind == "q_norm" else self.config.n_kv_heads
            rows = half_rows(self.config, 1).view(2, 1, -1).expand(2, heads, -1).flatten()
            weight = taken(weight, rows) * (scale if kind == "q_norm" else 1.0)
        elif kind == "o_proj":
            weight = taken(weight.T, self._rows[kind]).T
        elif kind in self._rows:
            weight = taken(weight, self._rows[kind])
            if kind == "q_proj" and not self.config.qk_norm:
                weight = weight * scale
        if kind == "embed_tokens":
            return _held(name, weight)
        if weight.dim() == 1:
            return _held(name, weight.view(1, -1, 1, 1))
        return _held(name, weight[:, :, None, None])

    def classifier(self) -> Array:
        """(V, D, 1, 1). Raises BadInput where float16 does not hold it."""
        name = "embed_tokens.weight" if self.config.tied_embeddings else "lm_head.weight"
        return _held(name, self.unpacked(name)[:, :, None, None])


def _held(name: str, weight: Tensor) -> Array:
    """Convert to float16, which must hold the numbers. Infinities and NaN stay, and show in the
    logits."""
    half = halved(weight)
    if np.isfinite(half).all() or not weight.isfinite().all():
        return half
    raise BadInput(
        f"{name}: has a number of magnitude {float(weight.abs().max()):,.0f}; an ML Program has "
        f"its weights in float16, which ends at {FLOAT16_MAX:,}"
    )


def halved(values: Tensor) -> Array:
    """Convert to contiguous float16."""
    return np.ascontiguousarray(values.to(torch.float16).numpy())


def rotation(config: ModelConfig, heads: int, sequence: int) -> tuple[Array, Array]:
    """Cosine and sine for half the channels of so many heads, (1, heads * padded head / 2, 1, S)
    each."""
    half = padded_head(config) // 2
    tables = []
    for table_SP in rope_tables(config, sequence):
        wide = torch.zeros(half, sequence)
        wide[: config.head_dim // 2] = table_SP.T
        tables.append(halved(wide.repeat(heads, 1)[None, :, None, :]))
    return tables[0], tables[1]


def causal_mask(sequence: int) -> Array:
    """(1, S, 1, S), keys by queries: MASKED where a key comes after the query."""
    mask = torch.full((sequence, sequence), MASKED).tril(-1)
    return halved(mask[None, :, None, :])


def weight_bytes(config: ModelConfig) -> int:
    """The bytes of the model's own weights in float16."""
    return 2 * sum(math.prod(shape) for shape in config.weight_shapes().values())
