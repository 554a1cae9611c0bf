"""Build the plan of a forward, with its bytes and operations counted.

Shapes: B batch, S sequence, T cached positions, D model width, H heads, K kv heads, E head width,
F hidden width, V vocabulary, P positions with logits (1 or S).

Additions, multiplications, divisions and functions of one number (exp, 1/sqrt) count one operation
each; a sum of n terms counts n additions, so a product of (M, K) and (K, N) is 2 M N K.
Comparisons count nothing: a maximum is free, and so is `sample`, whose work depends on the
sampling. The rotary tables, which an engine may read or compute (2 S E numbers), and the
normalized rows, which need not leave their stage, are not counted either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.plan.kinds import (
    NO_LAYER,
    STAGE_KINDS,
    buffers_of,
    cache_name,
    is_cache,
    weights_of,
)
from onelaunch.plan.stages import Access, Buffer, Plan, Role, Stage

# Ids fit 24 bits; logits are float32 on every engine.
ID_ITEMSIZE = 4
LOGIT_ITEMSIZE = 4

# Per element: x cos + (the pair's other element) sin.
ROPE_FLOPS = 3
# Per element: silu is g / (1 + exp(-g)), then the product with up.
SWIGLU_FLOPS = 5
# Per visible key: scale, subtract the maximum, exp, add to the sum, divide by the sum.
SOFTMAX_FLOPS = 5


def norm_flops(width: int) -> int:
    """Operations of one row of x / sqrt(mean(x^2) + eps) * weight: squares and their sum, two
    products per element, and the mean, eps and 1/sqrt."""
    return 4 * width + 3


def product_flops(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product, (rows, inner) times (inner, columns)."""
    return 2 * rows * inner * columns


def visible_pairs(sequence: int, past: int) -> int:
    """Count (query, key) pairs under the causal mask: cached keys, and new ones up to the query."""
    return sequence * past + sequence * (sequence + 1) // 2


def make_plan(
    config: ModelConfig,
    batch: int = 1,
    sequence: int = 1,
    past: int = 0,
    *,
    all_positions: bool = False,
    sample: bool = False,
    weight_itemsize: int = 4,
    activation_itemsize: int = 4,
) -> Plan:
    """Plan a forward of `batch` sequences, `sequence` new tokens each after `past` cached ones.

    Logits are of the last position of each sequence, or of `all_positions`; `sample` adds the stage
    that picks the next token. Item sizes are in bytes; the caches have the item size of
    activations. Raises BadInput if a number is out of range, the positions exceed the model's
    context, or the model has work that no stage has.
    """
    if reason := unplanned(config):
        raise BadInput(f"{reason}: plans have no stage for it")
    _at_least("batch", batch, 1)
    _at_least("sequence", sequence, 1)
    _at_least("past", past, 0)
    _at_least("weight_itemsize", weight_itemsize, 1)
    _at_least("activation_itemsize", activation_itemsize, 1)
    if past + sequence > config.max_seq_len:
        raise BadInput(
            f"{sequence} tokens after {past} exceed the model's context of "
            f"{config.max_seq_len}; use fewer"
        )
    logit_positions = sequence if all_positions else 1
    buffers = [Buffer("tokens", (batch, sequence), ID_ITEMSIZE, "input")]
    for name, shape in activation_shapes(config, batch, sequence, past).items():
        role: Role = "state" if is_cache(name) else "scratch"
        buffers.append(Buffer(name, shape, activation_itemsize, role))
    logits_shape = (batch, logit_positions, config.vocab_size)
    role = "output" if all_positions or not sample else "scratch"
    buffers.append(Buffer("logits", logits_shape, LOGIT_ITEMSIZE, role))
    if sample:
        buffers.append(Buffer("next", (batch,), ID_ITEMSIZE, "output"))
    builder = _PlanBuilder(config, batch, sequence, past, weight_itemsize, buffers)
    builder.embed()
    for layer in range(config.n_layers):
        builder.attention_block(layer)
        builder.ffn_block(layer)
    builder.head(logit_positions)
    if sample:
        builder.sample()
    return Plan(
        config,
        batch,
        sequence,
        past,
        weight_itemsize,
        activation_itemsize,
        tuple(builder.stages),
        tuple(buffers),
    )


def unplanned(config: ModelConfig) -> str | None:
    """What of a model is in no stage, as in "norm_placement='post'"; None where there is nothing.

    Stages have the layers of Llama and Qwen3, and biases of queries, keys and values.
    """
    return next((each for each in config.extensions if each != "qkv_bias=True"), None)


def activation_shapes(
    config: ModelConfig, batch: int, sequence: int, past: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the buffers between stages and of each layer's keys and values. The caches have the
    positions that are filled after this forward; an engine may allocate more."""
    cache = (2, batch, config.n_kv_heads, past + sequence, config.head_dim)
    return {
        "x": (batch, sequence, config.dim),
        "q": (batch, sequence, config.q_dim),
        "attn_out": (batch, sequence, config.q_dim),
        "hidden": (batch, sequence, config.hidden_dim),
        **{cache_name(layer): cache for layer in range(config.n_layers)},
    }


class _PlanBuilder:
    """Adds stages in order and counts the versions of the buffers."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        sequence: int,
        past: int,
        weight_itemsize: int,
        buffers: Sequence[Buffer],
    ) -> None:
        self.config, self.batch, self.sequence, self.past = config, batch, sequence, past
        self.rows = batch * sequence
        self.weight_itemsize = weight_itemsize
        self.weight_elements = {
            name: math.prod(shape) for name, shape in config.weight_shapes().items()
        }
        self.buffers = {buffer.name: buffer for buffer in buffers}
        self.versions = dict.fromkeys(self.buffers, 0)
        self.stages: list[Stage] = []

    def embed(self) -> None:
        self._add("embed", NO_LAYER, 0, weight_elements=self.rows * self.config.dim)

    def attention_block(self, layer: int) -> None:
        c, rows = self.config, self.rows
        flops = rows * norm_flops(c.dim) + product_flops(rows, c.dim, c.q_dim + 2 * c.kv_dim)
        flops += ROPE_FLOPS * rows * (c.q_dim + c.kv_dim)
        if c.qkv_bias:
            flops += rows * (c.q_dim + 2 * c.kv_dim)
        if c.qk_norm:
            flops += rows * (c.n_heads + c.n_kv_heads) * norm_flops(c.head_dim)
        appended = {cache_name(layer): 2 * rows * c.kv_dim}
        self._add("qkv", layer, flops, writes=appended)

        pairs = self.batch * visible_pairs(self.sequence, self.past)
        flops = pairs * c.n_heads * (4 * c.head_dim + SOFTMAX_FLOPS)
        self._add("attention", layer, flops)
        self._add("out_proj", layer, product_flops(rows, c.q_dim, c.dim) + rows * c.dim)

    def ffn_block(self, layer: int) -> None:
        c, rows = self.config, self.rows
        flops = rows * norm_flops(c.dim) + product_flops(rows, c.dim, 2 * c.hidden_dim)
        flops += SWIGLU_FLOPS * rows * c.hidden_dim
        self._add("gate_up", layer, flops)
        self._add("down", layer, product_flops(rows, c.hidden_dim, c.dim) + rows * c.dim)

    def head(self, positions: int) -> None:
        c, rows = self.config, self.batch * positions
        flops = rows * norm_flops(c.dim) + product_flops(rows, c.dim, c.vocab_size)
        self._add("head", NO_LAYER, flops, reads={"x": rows * c.dim})

    def sample(self) -> None:
        self._add("sample", NO_LAYER, 0, reads={"logits": self.batch * self.config.vocab_size})

    def _add(
        self,
        kind: str,
        layer: int,
        flops: int,
        reads: Mapping[str, int] = MappingProxyType({}),
        writes: Mapping[str, int] = MappingProxyType({}),
        weight_elements: int | None = None,
    ) -> None:
        """Add a stage. `reads` and `writes` give the elements of buffers that are used in part;
        `weight_elements` the elements of the weights, if not all are read."""
        weights = weights_of(self.config, kind, layer)
        if weight_elements is None:
            weight_elements = sum(self.weight_elements[name] for name in weights)
        read_names = buffers_of(STAGE_KINDS[kind].reads, layer)
        written_names = buffers_of(STAGE_KINDS[kind].writes, layer)
        read = tuple(self._access(name, reads.get(name)) for name in read_names)
        for name in written_names:
            self.versions[name] += 1
        written = tuple(self._access(name, writes.get(name)) for name in written_names)
        weight_bytes = weight_elements * self.weight_itemsize
        self.stages.append(Stage(kind, layer, read, written, weights, weight_bytes, flops))

    def _access(self, name: str, elements: int | None) -> Access:
        buffer = self.buffers[name]
        nbytes = buffer.nbytes if elements is None else elements * buffer.itemsize
        return Access(name, self.versions[name], nbytes)


def _at_least(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise BadInput(f"{name} {value!r}: must be a whole number of at least {minimum}")
