"""A model's weights as the stages read them.

The weight of a norm is multiplied into the columns of the products that follow it, in float32 and
rounded once, so that a stage needs of a norm the rows' 1 / rms alone. Heads of queries and keys
have the first elements of their rotary pairs in their first half and the others in their second,
whichever way the model pairs them: scores do not change when both are permuted alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.model import rope_tables


@dataclass(frozen=True)
class PackedLayer:
    """qkv: ((H + 2 K) E, D); norms: (2, E), of queries and keys, or None where the model has none;
    out: (D, H E); gate_up: (2 F, D); down: (D, F)."""

    qkv: Tensor
    norms: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class PackedModel:
    """embedding: (V, D); head: (V, D); cos and sin: (positions, E / 2) in float32."""

    embedding: Tensor
    layers: tuple[PackedLayer, ...]
    head: Tensor
    cos: Tensor
    sin: Tensor


def pack(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> PackedModel:
    """Canonical weights, in any dtype and anywhere, laid out in `dtype` on a device."""

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype).contiguous()

    def folded(weight: Tensor, norm: str) -> Tensor:
        return placed(weight.float() * weights[norm].float())

    layers = []
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        q, k, v = (weights[f"{attn}{name}_proj.weight"] for name in "qkv")
        qkv = torch.cat((_paired(config, q), _paired(config, k), v))
        gate_up = torch.cat([weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")])
        norms = None
        if config.qk_norm:
            both = [_paired(config, weights[f"{attn}{name}_norm.weight"]) for name in "qk"]
            norms = placed(torch.stack(both))
        layers.append(
            PackedLayer(
                folded(qkv, f"{prefix}input_layernorm.weight"),
                norms,
                placed(weights[f"{attn}o_proj.weight"]),
                folded(gate_up, f"{prefix}post_attention_layernorm.weight"),
                placed(weights[f"{mlp}down_proj.weight"]),
            )
        )
    embedding = weights["embed_tokens.weight"]
    classifier = embedding if config.tied_embeddings else weights["lm_head.weight"]
    cos, sin = (table.to(device).contiguous() for table in rope_tables(config))
    return PackedModel(
        placed(embedding), tuple(layers), folded(classifier, "norm.weight"), cos, sin
    )


def _paired(config: ModelConfig, weight: Tensor) -> Tensor:
    """Rows of whole heads, each head's pairs split in two halves."""
    if config.rope_layout != "interleaved":
        return weight
    heads = weight.unflatten(0, (-1, config.head_dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)
