"""The model in plain PyTorch: the definition that every engine must equal.

Shapes: B batch, S sequence, T cached positions, D model width, H heads, K kv heads, E head width,
C width of a projection, F hidden width, V vocabulary.

A layer is a function of its weights, not a tree of calling modules: reading a module's parameter
and entering its `__call__` cost about as much as a small matrix-vector product does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelaunch.config import NORM_NAMES, Activation, ModelConfig
from onelaunch.model.cache import Cache, KVCache, RaggedCache, causal_mask
from onelaunch.model.rope import apply_rope, rope_frequencies, rope_tables, widen_rope

__all__ = [
    "ROPE_POSITIONS",
    "Cache",
    "KVCache",
    "Layer",
    "LayerWeights",
    "Model",
    "Norm",
    "Positions",
    "RaggedCache",
    "apply_rope",
    "attention",
    "feed_forward",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "softcapped",
    "widen_rope",
]

# Rotary tables are made for so many positions at once where the context is longer.
ROPE_POSITIONS = 4096

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(x (..., C), weight (C,), eps) -> x normalized over C: the formula of `rms_norm` below."""


class LayerWeights(NamedTuple):
    """One layer's tensors; projections are (out, in). `input_norm_D` is the norm before attention,
    `post_norm_D` the one before the MLP, the last two those after each, in the residual branch.
    Norms of queries and keys are as wide as a head, or as all of them where `qk_norm` is "full".
    """

    input_norm_D: Tensor | None
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    post_norm_D: Tensor | None
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    attn_out_norm_D: Tensor | None = None
    mlp_out_norm_D: Tensor | None = None


Rope = Literal["none", "main", "sliding"]
"""Which rotary tables a layer has: those of `rope_theta`, or of `sliding_rope_theta`."""


def _kind(config: ModelConfig, layer: int) -> tuple[int | None, Rope]:
    """The window of a layer and its rotary tables."""
    window = config.window(layer)
    if layer in config.layers_without_rope:
        return window, "none"
    own_base = window is not None and config.sliding_rope_theta is not None
    return window, "sliding" if own_base else "main"


class Positions(NamedTuple):
    """What attention in a layer knows of positions: the rotary tables, if it has any, and which
    earlier positions each one sees (None: all of them)."""

    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def offset_norm(norm: Norm, offset: float) -> Norm:
    """`norm` with `offset` added to its weights, in float32 at least: Gemma's weights are near 0,
    where bfloat16 has more digits than near 1."""

    def with_offset(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return norm(x.to(wide), weight.to(wide) + offset, eps).to(x.dtype)

    return with_offset if offset else norm


def attention(
    x_BSD: Tensor,
    w: LayerWeights,
    config: ModelConfig,
    rope: tuple[Tensor, Tensor] | None,
    dropout: float = 0.0,
    cache: Cache | None = None,
    layer: int = 0,
    norm: Norm = rms_norm,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention with rotary embedding, output projection included.

    mask: the positions that each one sees, where those are not all up to itself.
    """
    B, S, _ = x_BSD.shape
    E, eps = config.head_dim, config.norm_eps
    q_BSC = F.linear(x_BSD, w.q_proj, w.q_bias)
    k_BSC = F.linear(x_BSD, w.k_proj, w.k_bias)
    full_norm = config.qk_norm == "full"
    if full_norm and w.q_norm_E is not None and w.k_norm_E is not None:
        q_BSC, k_BSC = norm(q_BSC, w.q_norm_E, eps), norm(k_BSC, w.k_norm_E, eps)
    q_BHSE = q_BSC.view(B, S, config.n_heads, E).transpose(1, 2)
    k_BKSE = k_BSC.view(B, S, config.n_kv_heads, E).transpose(1, 2)
    v_BKSE = F.linear(x_BSD, w.v_proj, w.v_bias).view(B, S, config.n_kv_heads, E).transpose(1, 2)
    if not full_norm and w.q_norm_E is not None and w.k_norm_E is not None:
        q_BHSE, k_BKSE = norm(q_BHSE, w.q_norm_E, eps), norm(k_BKSE, w.k_norm_E, eps)
    if rope is not None:
        interleaved = config.rope_layout == "interleaved"
        q_BHSE = apply_rope(q_BHSE, *rope, interleaved)
        k_BKSE = apply_rope(k_BKSE, *rope, interleaved)
    if cache is not None:
        k_BKSE, v_BKSE = cache.extend(layer, k_BKSE, v_BKSE)
    out_BHSE = F.scaled_dot_product_attention(
        q_BHSE,
        k_BKSE,
        v_BKSE,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=S > 1 and mask is None,
        scale=config.attention_scale,
        enable_gqa=config.n_kv_heads != config.n_heads,
    )
    return F.linear(out_BHSE.transpose(1, 2).reshape(B, S, config.q_dim), w.o_proj)


def feed_forward(x_BSD: Tensor, w: LayerWeights, activation: Activation = "silu") -> Tensor:
    """SwiGLU: down(silu(gate x) * up x), or GEGLU, by GELU in its place (Shazeer, 2002.05202)."""
    gate_BSF = F.linear(x_BSD, w.gate_proj)
    gate_BSF = F.silu(gate_BSF) if activation == "silu" else F.gelu(gate_BSF, approximate="tanh")
    return F.linear(gate_BSF * F.linear(x_BSD, w.up_proj), w.down_proj)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap) (Gemma Team, 2408.00118); without a cap the logits as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Layer(nn.Module):
    """Holds one layer's parameters under their canonical names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config

        def linear(out_features: int, in_features: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=bias)

        names = NORM_NAMES[c.norm_placement]
        for name in names[:2]:
            if name is not None:
                self.add_module(name, nn.RMSNorm(c.dim, c.norm_eps))
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(c.q_dim, c.dim, c.qkv_bias),
                "k_proj": linear(c.kv_dim, c.dim, c.qkv_bias),
                "v_proj": linear(c.kv_dim, c.dim, c.qkv_bias),
                "o_proj": linear(c.dim, c.q_dim),
            }
        )
        if c.qk_norm:
            full = c.qk_norm == "full"
            self.self_attn["q_norm"] = nn.RMSNorm(c.q_dim if full else c.head_dim, c.norm_eps)
            self.self_attn["k_norm"] = nn.RMSNorm(c.kv_dim if full else c.head_dim, c.norm_eps)
        for name in names[2:]:
            if name is not None:
                self.add_module(name, nn.RMSNorm(c.dim, c.norm_eps))
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(c.hidden_dim, c.dim),
                "up_proj": linear(c.hidden_dim, c.dim),
                "down_proj": linear(c.dim, c.hidden_dim),
            }
        )
        self._norm_names = names

    def weights(self) -> LayerWeights:
        """The parameters as one tuple."""
        a: Any = self.self_attn  # a ModuleDict's members are typed as Module, their weights unknown
        m: Any = self.mlp
        qk_norm = "q_norm" in a
        before_attention, after_attention, before_mlp, after_mlp = (
            None if name is None else getattr(self, name).weight for name in self._norm_names
        )
        return LayerWeights(
            before_attention,
            a["q_proj"].weight,
            a["k_proj"].weight,
            a["v_proj"].weight,
            a["o_proj"].weight,
            a["q_norm"].weight if qk_norm else None,
            a["k_norm"].weight if qk_norm else None,
            before_mlp,
            m["gate_proj"].weight,
            m["up_proj"].weight,
            m["down_proj"].weight,
            a["q_proj"].bias,
            a["k_proj"].bias,
            a["v_proj"].bias,
            after_attention,
            after_mlp,
        )


class Model(nn.Module):
    """A decoder-only transformer. Its state dict has exactly `config.weight_shapes()`'s names.

    `dropout` acts on the embedding, the attention weights and both residual branches while
    training, as in llama2.c. `norm` computes every norm, those of queries and keys too; the
    `nn.RMSNorm` modules only hold weights.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0, norm: Norm = rms_norm) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.norm_function = norm  # `norm` is a name of the state dict
        # not initialized here: on "meta" that alone imports torch's compiler, a second and more
        table_VD = torch.empty(config.vocab_size, config.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._kinds = [_kind(config, layer) for layer in range(config.n_layers)]
        self._rope: dict[tuple[torch.device, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_weights(
        cls,
        config: ModelConfig,
        weights: dict[str, Tensor],
        dropout: float = 0.0,
        norm: Norm = rms_norm,
    ) -> Model:
        """A model that uses the given tensors as they are, without a copy."""
        with torch.device("meta"):
            model = cls(config, dropout, norm)
        # by hand: load_state_dict leaves a cycle behind that holds the weights until a collection
        names = dict(model.named_parameters())
        if names.keys() != weights.keys():
            odd = sorted(names.keys() ^ weights.keys())
            raise RuntimeError(f"the weights are not this model's: {', '.join(odd)}")
        for name, parameter in names.items():
            if parameter.shape != weights[name].shape:
                raise RuntimeError(f"size mismatch for {name}: {tuple(weights[name].shape)}")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weights[name], False))
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def init_weights(self, seed: int) -> Model:
        """Normal with deviation 1/sqrt(dim), the two residual projections narrower by
        sqrt(2 layers), as in GPT-2; norms one, biases zero. GPT-2's own 0.02 is right near 2,500
        wide and too little for narrow models: docs/log.md has figures. The same seed gives the same
        weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        base_std = self.config.dim**-0.5
        residual_std = base_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                is_bias = name.endswith(".bias")
                parameter.fill_(0.0 if is_bias else 1.0 - self.config.norm_offset)
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else base_std
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(values)
        return self

    def head_weight(self) -> Tensor:
        """The classifier, (V, D); the embedding itself where they are tied."""
        if self.config.tied_embeddings:
            return self.embed_tokens.weight
        return self.lm_head.weight

    def layer_weights(self) -> list[LayerWeights]:
        """Every layer's parameters; decoding loops take them once instead of at each token."""
        return [layer.weights() for layer in self.layers]  # type: ignore[operator,union-attr]

    def rope(
        self, device: torch.device, dtype: torch.dtype, length: int, sliding: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`apply_rope`'s tables, (positions, E), for at least `length` positions; those of the
        base of `sliding` layers. They are kept and grow when asked for more: a context of millions
        costs what is used of it."""
        key = (device, dtype, sliding)
        if key not in self._rope or self._rope[key][0].shape[0] < length:
            config = self.config
            if sliding:
                theta = config.sliding_rope_theta
                config = config.with_(rope_theta=theta, rope_scaling=None)
            positions = min(config.max_seq_len, max(ROPE_POSITIONS, 2 * length))
            # Tables made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                interleaved = config.rope_layout == "interleaved"
                cos, sin = widen_rope(*rope_tables(config, positions), interleaved)
                self._rope[key] = (cos.to(device, dtype), sin.to(device, dtype))
        return self._rope[key]

    def positions(
        self, S: int, cache: Cache | None, device: torch.device, dtype: torch.dtype
    ) -> list[Positions]:
        """What each layer knows of the next S positions. Layers of one kind share it."""
        start = cache.length if cache is not None else 0
        kinds: dict[tuple[int | None, Rope], Positions] = {}
        layers = []
        for kind in self._kinds:
            if kind not in kinds:
                window, base = kind
                if cache is not None:
                    mask = cache.mask(S, device, window)
                else:
                    mask = causal_mask(S, 0, window, device)
                rope = None
                if base == "main":
                    rope = self.rope(device, dtype, start + S)
                elif base == "sliding":
                    rope = self.rope(device, dtype, start + S, sliding=True)
                if rope is not None:
                    cos, sin = rope
                    rope = (cos[:S], sin[:S]) if cache is None else cache.rope(cos, sin, S)
                kinds[kind] = Positions(rope, mask)
            layers.append(kinds[kind])
        return layers

    def hidden(
        self,
        tokens_BS: Tensor,
        cache: Cache | None = None,
        layers: list[LayerWeights] | None = None,
    ) -> Tensor:
        """The last layer's normalized output, (B, S, D); appends to `cache` where one is given."""
        config, eps = self.config, self.config.norm_eps
        norm = offset_norm(self.norm_function, config.norm_offset)
        dropout = self.dropout if self.training else 0.0
        x_BSD = F.embedding(tokens_BS, self.embed_tokens.weight)
        if config.embedding_scale != 1:  # rounded to the dtype, as Gemma was trained
            x_BSD = x_BSD * torch.tensor(config.embedding_scale, dtype=x_BSD.dtype)
        compute = x_BSD.dtype
        if torch.is_autocast_enabled(x_BSD.device.type):
            compute = torch.get_autocast_dtype(x_BSD.device.type)
        S = tokens_BS.shape[1]
        positions = self.positions(S, cache, x_BSD.device, compute)
        x_BSD = F.dropout(x_BSD, dropout) if dropout else x_BSD
        for i, w in enumerate(layers if layers is not None else self.layer_weights()):
            normed = x_BSD if w.input_norm_D is None else norm(x_BSD, w.input_norm_D, eps)
            rope, mask = positions[i]
            branch = attention(normed, w, config, rope, dropout, cache, i, norm, mask)
            if w.attn_out_norm_D is not None:
                branch = norm(branch, w.attn_out_norm_D, eps)
            x_BSD = x_BSD + (F.dropout(branch, dropout) if dropout else branch)
            normed = x_BSD if w.post_norm_D is None else norm(x_BSD, w.post_norm_D, eps)
            branch = feed_forward(normed, w, config.activation)
            if w.mlp_out_norm_D is not None:
                branch = norm(branch, w.mlp_out_norm_D, eps)
            x_BSD = x_BSD + (F.dropout(branch, dropout) if dropout else branch)
        if cache is not None:
            cache.length += S
        return norm(x_BSD, self.norm.weight, eps)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of every position, (B, S, V), in float32."""
        logits = F.linear(self.hidden(tokens_BS), self.head_weight()).float()
        return softcapped(logits, self.config.logit_softcap)

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -1, in float32."""
        logits = self(tokens_BS)
        return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), ignore_index=-1)
