"""The model in plain PyTorch: the definition that every engine must equal.

Shapes: B batch, S sequence, T cached positions, D model width, H heads, K kv heads, E head width,
F hidden width, V vocabulary.

A layer is a function of its weights, not a tree of calling modules: reading a module's parameter
and entering its `__call__` cost about as much as a small matrix-vector product does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onelaunch.config import ModelConfig, RopeScaling

# Rotary tables are made for so many positions at once where the context is longer.
ROPE_POSITIONS = 4096

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(x (..., C), weight (C,), eps) -> x normalized over C: the formula of `rms_norm` below."""


class LayerWeights(NamedTuple):
    """One layer's tensors; projections are (out, in)."""

    input_norm_D: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    post_norm_D: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor


class KVCache:
    """Keys and values of the positions seen so far, for every layer.

    `keys` and `values` are lists of (B, K, capacity, E); `length` positions are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length = 0

    def row(self, row: int, length: int) -> KVCache:
        """One sequence's cache over the same memory, of which `length` positions are filled."""
        one = copy(self)
        one.keys = [keys[row : row + 1] for keys in self.keys]
        one.values = [values[row : row + 1] for values in self.values]
        one.length = length
        return one

    def extend(self, layer: int, k_BKSE: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions to one layer; returns that layer's (B, K, T+S, E) keys and values."""
        end = self.length + k_BKSE.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k_BKSE
        values[:, :, self.length : end] = v_BKSE
        return keys[:, :, :end], values[:, :, :end]

    def rope(self, cos_SE: Tensor, sin_SE: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """The rotary tables of the next S positions."""
        end = self.length + S
        return cos_SE[self.length : end], sin_SE[self.length : end]

    def mask(self, S: int, device: torch.device) -> Tensor | None:
        """Which positions the next S may see, where that is neither all nor those before each."""
        if S == 1 or not self.length:
            return None
        T = self.length + S
        return torch.ones(S, T, dtype=torch.bool, device=device).tril(self.length)


class RaggedCache:
    """The first rows of a cache, filled to different lengths, for one more token of each.

    `lengths` has a number for each row; they are not changed.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int]) -> None:
        device = cache.keys[0].device
        self.keys, self.values = cache.keys, cache.values
        self.length = max(lengths)
        self._positions_B = torch.tensor(lengths, device=device)
        self._rows_B = torch.arange(len(lengths), device=device)
        positions_T = torch.arange(self.length + 1, device=device)
        self._mask_B11T = positions_T <= self._positions_B[:, None, None, None]

    def extend(self, layer: int, k_BK1E: Tensor, v_BK1E: Tensor) -> tuple[Tensor, Tensor]:
        """Put a position into each row of one layer; returns keys and values, (B, K, T, E), as
        many positions as the longest row has."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows_B, :, self._positions_B] = k_BK1E[:, :, 0].to(keys.dtype)
        values[self._rows_B, :, self._positions_B] = v_BK1E[:, :, 0].to(values.dtype)
        rows, T = len(k_BK1E), self.length + 1
        return keys[:rows, :, :T], values[:rows, :, :T]

    def rope(self, cos_SE: Tensor, sin_SE: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """The rotary tables at each row's next position, (B, 1, 1, E)."""
        positions_B11 = self._positions_B[:, None, None]
        return cos_SE[positions_B11], sin_SE[positions_B11]

    def mask(self, S: int, device: torch.device) -> Tensor:
        """Which positions each row's token may see, (B, 1, 1, T)."""
        return self._mask_B11T


Cache = KVCache | RaggedCache


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each of the E/2 pairs: theta^(-2i/E) (Su et al., 2104.09864),
    stretched by Llama 3's scaling where the configuration asks for it."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is None:
        return frequencies
    return _llama3_scaled(frequencies, config.rope_scaling)


def _llama3_scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, the ones between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(turns < low, frequencies / scaling.factor, blended)
    return torch.where(turns > high, frequencies, slowed)


def rope_tables(config: ModelConfig, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (positions, E/2) in float32."""
    positions = torch.arange(length or config.max_seq_len).float()
    angles = torch.outer(positions, rope_frequencies(config))
    return torch.cos(angles), torch.sin(angles)


def widen_rope(cos_SP: Tensor, sin_SP: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The tables for whole heads, (S, E); the sine of a pair's first element is negated."""
    pair_axis = -1 if interleaved else -2
    cos_SE = torch.stack((cos_SP, cos_SP), dim=pair_axis).flatten(-2)
    return cos_SE, torch.stack((-sin_SP, sin_SP), dim=pair_axis).flatten(-2)


def apply_rope(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of each head: x cos + (the pair's other element) sin.

    Written over whole heads, as half as many operations as over the two elements of each pair.
    """
    if interleaved:
        other = x_BHSE.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = torch.cat(x_BHSE.chunk(2, dim=-1)[::-1], dim=-1)
    return torch.addcmul(x_BHSE * cos_SE, other, sin_SE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def attention(
    x_BSD: Tensor,
    w: LayerWeights,
    config: ModelConfig,
    rope: tuple[Tensor, Tensor],
    dropout: float = 0.0,
    cache: Cache | None = None,
    layer: int = 0,
    norm: Norm = rms_norm,
) -> Tensor:
    """Causal grouped-query attention with rotary embedding, output projection included."""
    B, S, _ = x_BSD.shape
    E = config.head_dim
    q_BHSE = F.linear(x_BSD, w.q_proj).view(B, S, config.n_heads, E).transpose(1, 2)
    k_BKSE = F.linear(x_BSD, w.k_proj).view(B, S, config.n_kv_heads, E).transpose(1, 2)
    v_BKSE = F.linear(x_BSD, w.v_proj).view(B, S, config.n_kv_heads, E).transpose(1, 2)
    if w.q_norm_E is not None and w.k_norm_E is not None:
        q_BHSE = norm(q_BHSE, w.q_norm_E, config.norm_eps)
        k_BKSE = norm(k_BKSE, w.k_norm_E, config.norm_eps)
    interleaved = config.rope_layout == "interleaved"
    q_BHSE = apply_rope(q_BHSE, *rope, interleaved)
    k_BKSE = apply_rope(k_BKSE, *rope, interleaved)
    mask = None
    if cache is not None:
        mask = cache.mask(S, x_BSD.device)
        k_BKSE, v_BKSE = cache.extend(layer, k_BKSE, v_BKSE)
    out_BHSE = F.scaled_dot_product_attention(
        q_BHSE,
        k_BKSE,
        v_BKSE,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=S > 1 and mask is None,
        enable_gqa=config.n_kv_heads != config.n_heads,
    )
    return F.linear(out_BHSE.transpose(1, 2).reshape(B, S, config.q_dim), w.o_proj)


def feed_forward(x_BSD: Tensor, w: LayerWeights) -> Tensor:
    """SwiGLU: down(silu(gate x) * up x) (Shazeer, 2002.05202)."""
    return F.linear(F.silu(F.linear(x_BSD, w.gate_proj)) * F.linear(x_BSD, w.up_proj), w.down_proj)


class Layer(nn.Module):
    """Holds one layer's parameters under their canonical names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config

        def linear(out_features: int, in_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False)

        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(c.q_dim, c.dim),
                "k_proj": linear(c.kv_dim, c.dim),
                "v_proj": linear(c.kv_dim, c.dim),
                "o_proj": linear(c.dim, c.q_dim),
            }
        )
        if c.qk_norm:
            self.self_attn["q_norm"] = nn.RMSNorm(c.head_dim, c.norm_eps)
            self.self_attn["k_norm"] = nn.RMSNorm(c.head_dim, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(c.hidden_dim, c.dim),
                "up_proj": linear(c.hidden_dim, c.dim),
                "down_proj": linear(c.dim, c.hidden_dim),
            }
        )

    def weights(self) -> LayerWeights:
        """The parameters as one tuple."""
        a: Any = self.self_attn  # a ModuleDict's members are typed as Module, their weights unknown
        m: Any = self.mlp
        qk_norm = "q_norm" in a
        return LayerWeights(
            self.input_layernorm.weight,
            a["q_proj"].weight,
            a["k_proj"].weight,
            a["v_proj"].weight,
            a["o_proj"].weight,
            a["q_norm"].weight if qk_norm else None,
            a["k_norm"].weight if qk_norm else None,
            self.post_attention_layernorm.weight,
            m["gate_proj"].weight,
            m["up_proj"].weight,
            m["down_proj"].weight,
        )


class Model(nn.Module):
    """A Llama-family decoder. Its state dict has exactly `config.weight_shapes()`'s names.

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
        self._rope: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

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
        sqrt(2 layers), as in GPT-2; norms one. GPT-2's own 0.02 is right near 2,500 wide and too
        little for narrow models: docs/log.md has figures. The same seed gives the same weights on
        every device."""
        generator = torch.Generator().manual_seed(seed)
        base_std = self.config.dim**-0.5
        residual_std = base_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
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

    def rope(self, device: torch.device, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        """`apply_rope`'s tables, (positions, E), for at least `length` positions. They are kept
        and grow when asked for more: a context of millions costs what is used of it."""
        key = (device, dtype)
        if key not in self._rope or self._rope[key][0].shape[0] < length:
            positions = min(self.config.max_seq_len, max(ROPE_POSITIONS, 2 * length))
            # Tables made in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                interleaved = self.config.rope_layout == "interleaved"
                cos, sin = widen_rope(*rope_tables(self.config, positions), interleaved)
                self._rope[key] = (cos.to(device, dtype), sin.to(device, dtype))
        return self._rope[key]

    def hidden(
        self,
        tokens_BS: Tensor,
        cache: Cache | None = None,
        layers: list[LayerWeights] | None = None,
    ) -> Tensor:
        """The last layer's normalized output, (B, S, D); appends to `cache` where one is given."""
        config, norm = self.config, self.norm_function
        dropout = self.dropout if self.training else 0.0
        x_BSD = F.embedding(tokens_BS, self.embed_tokens.weight)
        compute = x_BSD.dtype
        if torch.is_autocast_enabled(x_BSD.device.type):
            compute = torch.get_autocast_dtype(x_BSD.device.type)
        start = cache.length if cache is not None else 0
        S = tokens_BS.shape[1]
        end = start + S
        cos, sin = self.rope(x_BSD.device, compute, end)
        rope = (cos[:end], sin[:end]) if cache is None else cache.rope(cos, sin, S)
        x_BSD = F.dropout(x_BSD, dropout) if dropout else x_BSD
        for i, w in enumerate(layers if layers is not None else self.layer_weights()):
            normed = norm(x_BSD, w.input_norm_D, config.norm_eps)
            branch = attention(normed, w, config, rope, dropout, cache, i, norm)
            x_BSD = x_BSD + (F.dropout(branch, dropout) if dropout else branch)
            branch = feed_forward(norm(x_BSD, w.post_norm_D, config.norm_eps), w)
            x_BSD = x_BSD + (F.dropout(branch, dropout) if dropout else branch)
        if cache is not None:
            cache.length = end
        return norm(x_BSD, self.norm.weight, config.norm_eps)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits of every position, (B, S, V), in float32."""
        return F.linear(self.hidden(tokens_BS), self.head_weight()).float()

    def loss(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -1, in float32."""
        logits = self(tokens_BS)
        return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), ignore_index=-1)
