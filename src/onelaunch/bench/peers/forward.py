"""The forward that a careful user writes in PyTorch: fused QKV and gate/up, library attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.model import rope_tables


class BareForward:
    """Logits of every position in the weights' dtype, tokens (B, S) to (B, S, V). Weights as
    checkpoints name them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config

        def placed(*names: str) -> Tensor:
            return torch.cat([weights[name] for name in names]).to(device, dtype)

        self.embedding = placed("embed_tokens.weight")
        self.norm = placed("norm.weight")
        tied = config.tied_embeddings
        self.head = self.embedding if tied else placed("lm_head.weight")
        self.layers: list[tuple[Any, ...]] = []
        for i in range(config.n_layers):
            at = f"layers.{i}."
            qkv = placed(*(f"{at}self_attn.{name}_proj.weight" for name in "qkv"))
            gate_up = placed(*(f"{at}mlp.{name}_proj.weight" for name in ("gate", "up")))
            norms: list[Tensor | None] = [None, None]
            if config.qk_norm:
                norms = [placed(f"{at}self_attn.{name}_norm.weight") for name in "qk"]
            self.layers.append(
                (
                    placed(f"{at}input_layernorm.weight"),
                    qkv,
                    *norms,
                    placed(f"{at}self_attn.o_proj.weight"),
                    placed(f"{at}post_attention_layernorm.weight"),
                    gate_up,
                    placed(f"{at}mlp.down_proj.weight"),
                )
            )
        cos, sin = rope_tables(config)
        self.cos, self.sin = cos.to(device, dtype), sin.to(device, dtype)

    def __call__(self, tokens_BS: Tensor) -> Tensor:
        c = self.config
        B, S = tokens_BS.shape
        H, K, E = c.n_heads, c.n_kv_heads, c.head_dim
        cos, sin = self.cos[:S], self.sin[:S]
        x = F.embedding(tokens_BS, self.embedding)
        for norm1, wqkv, q_norm, k_norm, wo, norm2, gate_up, down in self.layers:
            h = F.rms_norm(x, (c.dim,), norm1, c.norm_eps)
            qkv = F.linear(h, wqkv).view(B, S, H + 2 * K, E).transpose(1, 2)
            q, k, v = qkv.split((H, K, K), 1)
            if c.qk_norm:
                q = F.rms_norm(q, (E,), q_norm, c.norm_eps)
                k = F.rms_norm(k, (E,), k_norm, c.norm_eps)
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
            x = x + F.linear(y.transpose(1, 2).reshape(B, S, H * E), wo)
            h = F.rms_norm(x, (c.dim,), norm2, c.norm_eps)
            gate, up = F.linear(h, gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x, (c.dim,), self.norm, c.norm_eps), self.head)

    def rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads, (B, H, S, E), with the rotary embedding of tables (S, E / 2)."""
        if self.config.rope_layout == "interleaved":
            a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        a, b = heads.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
