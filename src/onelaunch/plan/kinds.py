"""The table of stage kinds: what each reads and writes, and its weights. Plans, their checks and
the engines all use it.

What a kind does, and in which order, is said elsewhere, by its name: build.py (order, buffers),
check.py (which order is right), tiles.py and launches.py (rows, joins), and in the engines
cpu/native/stages.py, cuda/stages/ and coreml/emit.py. The CUDA engine and Core ML have no `sample`.

Values: tokens; x, the residual stream; q, k, v, queries, keys and values of the heads, k and v in
the layer's cache; attn_out, the output of attention; hidden, silu(gate) * up; logits; next, the
sampled token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from onelaunch.config import ModelConfig

NO_LAYER = -1
_CACHE = "cache."
_CACHED = ("k", "v")

Extent = Callable[[ModelConfig], int]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of stage.

    `weights` are names as in a checkpoint, without the layer and `.weight`; those of QK-norm count
    if the model has it. `columns` is the number of columns written per row (heads in attention);
    `inner` the inner dimension of its matrix product, None without a product.

    For the backward: `saved` are the forward values that the gradient of the input needs,
    `operands` those that the weight gradients are products with. Besides the values above these
    are `input` and `middle`, x before the layer and between its blocks; `normed` and `normed_2`,
    x after their norms; `q_raw` and `k_raw`, q and k before QK-norm; `gate` and `up`."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    columns: Extent
    inner: Extent | None = None
    weights: tuple[str, ...] = ()
    block: Literal["attention", "ffn"] | None = None
    saved: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()


HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
STAGE_KINDS: dict[str, Kind] = {
    "embed": Kind(("tokens",), ("x",), lambda c: c.dim, weights=("embed_tokens",)),
    "qkv": Kind(
        ("x",),
        ("q", "k", "v"),
        lambda c: c.q_dim + 2 * c.kv_dim,
        lambda c: c.dim,
        (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            *HEAD_NORMS,
        ),
        "attention",
        saved=("input", "q_raw", "k_raw"),
        operands=("normed", "q_raw", "k_raw"),
    ),
    "attention": Kind(
        ("q", "k", "v"),
        ("attn_out",),
        lambda c: c.n_heads,
        block="attention",
        saved=("q", "k", "v"),
    ),
    "out_proj": Kind(
        ("x", "attn_out"),
        ("x",),
        lambda c: c.dim,
        lambda c: c.q_dim,
        ("self_attn.o_proj",),
        "attention",
        operands=("attn_out",),
    ),
    "gate_up": Kind(
        ("x",),
        ("hidden",),
        lambda c: c.hidden_dim,
        lambda c: c.dim,
        ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"),
        "ffn",
        saved=("middle", "gate", "up"),
        operands=("middle", "normed_2"),
    ),
    "down": Kind(
        ("x", "hidden"),
        ("x",),
        lambda c: c.dim,
        lambda c: c.hidden_dim,
        ("mlp.down_proj",),
        "ffn",
        operands=("hidden",),
    ),
    "head": Kind(
        ("x",), ("logits",), lambda c: c.vocab_size, lambda c: c.dim, ("norm", "lm_head")
    ),
    "sample": Kind(("logits",), ("next",), lambda c: 1),
}  # fmt: skip

# Compiled programs take a kind as its index in this tuple (cpu/native/stages.py numbers them in
# this order): add new kinds at the end.
KINDS = tuple(STAGE_KINDS)
ATTENTION_BLOCK = tuple(name for name, kind in STAGE_KINDS.items() if kind.block == "attention")
FFN_BLOCK = tuple(name for name, kind in STAGE_KINDS.items() if kind.block == "ffn")
LAYER_KINDS = ATTENTION_BLOCK + FFN_BLOCK


def cache_name(layer: int) -> str:
    """Name the buffer of the keys and values of one layer."""
    return f"{_CACHE}{layer}"


def is_cache(buffer: str) -> bool:
    """Return whether a buffer holds keys and values."""
    return buffer.startswith(_CACHE)


def buffers_of(values: Sequence[str], layer: int) -> tuple[str, ...]:
    """Name the buffers that hold these values of a layer, without duplicates."""
    names = (cache_name(layer) if value in _CACHED else value for value in values)
    return tuple(dict.fromkeys(names))


def weights_of(config: ModelConfig, kind: str, layer: int = NO_LAYER) -> tuple[str, ...]:
    """List the canonical names of the weights of a stage, and of biases."""
    prefix = "" if layer == NO_LAYER else f"layers.{layer}."
    biases: tuple[str, ...] = ()
    if kind == "qkv" and config.qkv_bias:
        biases = tuple(f"{prefix}self_attn.{name}_proj.bias" for name in "qkv")
    weights = tuple(
        f"{prefix}{'embed_tokens' if name == 'lm_head' and config.tied_embeddings else name}.weight"
        for name in STAGE_KINDS[kind].weights
        if config.qk_norm or name not in HEAD_NORMS
    )
    return weights + biases
