"""The gradients of a layer's weights: products of what its forward kept with what its backward
gave, on the host, in float32.

Values are (B, C, 1, S) by the names of the programs' taps and gradients (emit.py, backward.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.pack import half_rows, padded_head, returned, whole_rows

Product = Callable[[], Tensor]


def products(config: ModelConfig, layer: int, values: Mapping[str, Tensor]) -> dict[str, Product]:
    """Functions that compute each weight's gradient of a layer, by canonical name; independent of
    one another, so that threads may share them. `values` have the names without the layer."""
    c, prefix = config, f"layers.{layer}."
    q_rows, k_rows = half_rows(c, c.n_heads), half_rows(c, c.n_kv_heads)
    v_rows, attn_out_rows = whole_rows(c, c.n_kv_heads), whole_rows(c, c.n_heads)
    scale = c.head_dim**-0.5

    def product(d_out: str, operand: str) -> Tensor:
        return _rows(values[d_out]).T @ _rows(values[operand])

    def q_proj() -> Tensor:
        d_q = returned(product("d_q", "normed"), q_rows, c.q_dim)
        return d_q if c.qk_norm else d_q * scale

    products_of: dict[str, Product] = {
        "self_attn.q_proj": q_proj,
        "self_attn.k_proj": lambda: returned(product("d_k", "normed"), k_rows, c.kv_dim),
        "self_attn.v_proj": lambda: returned(product("d_v", "normed"), v_rows, c.kv_dim),
        "self_attn.o_proj": lambda: (
            returned(product("attn_out", "d_middle"), attn_out_rows, c.q_dim).T
        ),
        "mlp.gate_proj": lambda: product("d_gate", "normed_2"),
        "mlp.up_proj": lambda: product("d_up", "normed_2"),
        "mlp.down_proj": lambda: product("d_out", "hidden"),
        "input_layernorm": lambda: _norm(values["input"], values["d_normed"], c.norm_eps),
        "post_attention_layernorm": lambda: _norm(
            values["middle"], values["d_normed_2"], c.norm_eps
        ),
    }
    if c.qk_norm:
        # the scores' scale is in the weight of the queries' norm
        products_of["self_attn.q_norm"] = lambda: scale * _head_norm(c, values, "q", c.n_heads)
        products_of["self_attn.k_norm"] = lambda: _head_norm(c, values, "k", c.n_kv_heads)
    return {f"{prefix}{name}.weight": make for name, make in products_of.items()}


def operands(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The operands that each product of `products` reads, by the same names without the layer."""
    reads: dict[str, tuple[str, ...]] = {
        "self_attn.q_proj": ("d_q", "normed"),
        "self_attn.k_proj": ("d_k", "normed"),
        "self_attn.v_proj": ("d_v", "normed"),
        "self_attn.o_proj": ("attn_out", "d_middle"),
        "mlp.gate_proj": ("d_gate", "normed_2"),
        "mlp.up_proj": ("d_up", "normed_2"),
        "mlp.down_proj": ("d_out", "hidden"),
        "input_layernorm": ("input", "d_normed"),
        "post_attention_layernorm": ("middle", "d_normed_2"),
    }
    if config.qk_norm:
        reads["self_attn.q_norm"] = ("q_raw", "d_q_normed")
        reads["self_attn.k_norm"] = ("k_raw", "d_k_normed")
    return reads


def needed(config: ModelConfig) -> tuple[str, ...]:
    """The tensors that `products` reads of the forward, by the names of its taps."""
    raw = ("q_raw", "k_raw") if config.qk_norm else ()
    return ("input", "middle", "normed", "normed_2", "attn_out", "hidden", *raw)


def _rows(x: Tensor) -> Tensor:
    """(B, C, 1, S) as (B S, C)."""
    return x.float()[:, :, 0].transpose(1, 2).flatten(0, 1)


def _norm(x: Tensor, d_out: Tensor, eps: float) -> Tensor:
    rows, d_rows = _rows(x), _rows(d_out)
    normalized = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + eps)
    return (d_rows * normalized).sum(0)


def _head_norm(config: ModelConfig, values: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """Heads' rows are first halves, then second ones, padded."""
    half, E = padded_head(config) // 2, config.head_dim

    def by_head(x: Tensor) -> Tensor:
        return _rows(x).unflatten(1, (2, heads, half)).transpose(1, 2).flatten(2)

    raw, d_out = by_head(values[f"{name}_raw"]), by_head(values[f"d_{name}_normed"])
    mean = raw.square().sum(-1, keepdim=True) / E
    gradient = (d_out * raw * torch.rsqrt(mean + config.norm_eps)).sum((0, 1))
    return returned(gradient, half_rows(config, 1), E)
