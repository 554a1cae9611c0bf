"""A model's weights as the stages read them.

The weight of a norm is multiplied into the columns of the products that follow it, in float32 and
rounded once, so that a stage needs of a norm the rows' 1 / rms alone. In heads of queries and keys
the two elements of a rotary pair stand side by side, whichever way the model pairs them: scores do
not change when both are permuted alike. Rows of gate and up alternate. A layer is a slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.model import rope_tables


@dataclass(frozen=True)
class PackedModel:
    """embedding: (V, D); of L layers, qkv: (L, (H + 2 K) E, D); norms: (L, 2, E), of queries and
    keys, or None where the model has none; out: (L, D, H E); gate_up: (L, 2 F, D); down: (L, D, F);
    head: (V, D); cos and sin: (positions, E / 2) in float32; bad_id: (1,), int64, on the host,
    where a kernel leaves an id that the model does not have: 0 otherwise."""

    embedding: Tensor
    qkv: Tensor
    norms: Tensor | None
    out: Tensor
    gate_up: Tensor
    down: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    bad_id: Tensor

    def weight(self, kind: str, layer: int | None = None) -> Tensor:
        """The weight of a kind of stage: of one layer, or without one of all."""
        if kind == "head":
            return self.head
        weight: Tensor = getattr(self, {"out_proj": "out"}.get(kind, kind))
        return weight if layer is None else weight[layer]

    @cached_property
    def _bad_id(self) -> np.ndarray:
        """The same memory: NumPy reads a number in a tenth of a tensor's time."""
        array: np.ndarray = self.bad_id.numpy()
        return array

    def take_bad_id(self) -> int | None:
        """Return `bad_id` and clear it; None where there is none. The host's memory alone is looked
        at: of forwards that are under way it may not be there yet."""
        bad_id = int(self._bad_id[0])
        if not bad_id:
            return None
        self.bad_id.zero_()
        return bad_id


def pack(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> PackedModel:
    """Canonical weights, in any dtype and anywhere, laid out in `dtype` on a device."""

    c, layers = config, config.n_layers

    def empty(*shape: int) -> Tensor:
        return torch.empty(layers, *shape, dtype=dtype, device=device)

    def folded(weight: Tensor, norm: str) -> Tensor:
        return weight.float() * weights[norm].float()

    embedding = weights["embed_tokens.weight"]
    classifier = embedding if c.tied_embeddings else weights["lm_head.weight"]
    cos, sin = (table.to(device).contiguous() for table in rope_tables(c))
    packed = PackedModel(
        embedding.to(device=device, dtype=dtype, copy=True).contiguous(),
        empty(c.q_dim + 2 * c.kv_dim, c.dim),
        empty(2, c.head_dim) if c.qk_norm else None,
        empty(c.dim, c.q_dim),
        empty(2 * c.hidden_dim, c.dim),
        empty(c.dim, c.hidden_dim),
        folded(classifier, "norm.weight").to(device=device, dtype=dtype),
        cos,
        sin,
        torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda"),
    )
    for layer in range(layers):
        prefix = f"layers.{layer}."
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        q, k, v = (weights[f"{attn}{name}_proj.weight"] for name in "qkv")
        qkv = torch.cat((_paired(c, q), _paired(c, k), v))
        packed.qkv[layer] = folded(qkv, f"{prefix}input_layernorm.weight")
        if packed.norms is not None:
            both = [_paired(c, weights[f"{attn}{name}_norm.weight"]) for name in "qk"]
            packed.norms[layer] = torch.stack(both)
        packed.out[layer] = weights[f"{attn}o_proj.weight"]
        gate_up = [weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")]
        alternating = torch.stack(gate_up, 1).flatten(0, 1)
        packed.gate_up[layer] = folded(alternating, f"{prefix}post_attention_layernorm.weight")
        packed.down[layer] = weights[f"{mlp}down_proj.weight"]
    return packed


def _paired(config: ModelConfig, weight: Tensor) -> Tensor:
    """Rows of whole heads, each head's rotary pairs side by side."""
    if config.rope_layout == "interleaved":
        return weight
    heads = weight.unflatten(0, (-1, 2, config.head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
