"""A micro-step of training: forward, loss, backward and update as a list of work on buffers, as the
CUDA engine does it. The residual stream, its gradient, and those of weights are float32; what
products read and write has `itemsize` bytes.

What is kept of a layer for its backward are both residuals and their norms, packed queries, keys
and values, attention's output with the logarithms of its sums, gates and ups, and what the SwiGLU
gives. Where memory asks, less is kept: the backward computes what the SwiGLU gives again
("hidden"), or all of a layer from its input and the norm of it ("layers"; not of the last layer,
whose forward has just been). Logits exist for some rows at a time, so that they are no buffer of a
whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.plan.check import PlanError
from onelaunch.plan.kinds import NO_LAYER

LOGITS, FEWER_LOGITS = 1 << 29, 1 << 27
"""So many exist at once, about; the fewer cost some time, and round the head's gradient
elsewhere."""
FLOAT = 4

Recompute = Literal["nothing", "hidden", "layers"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
"""What the backward computes again, least first; the gradients are the same."""
Phase = Literal["forward", "loss", "backward", "update"]


def logit_rows(tokens: int, vocab_size: int, logits: int = LOGITS) -> int:
    """How many tokens have logits at once: equal parts of about `logits` numbers, in whole tiles of
    matrix products."""
    parts = -(-tokens * vocab_size // logits)
    return min(tokens, -(-tokens // parts // 128) * 128)


class Work(NamedTuple):
    """One operation. `reads` and `writes` are buffers, which may be the same; `weights` are read
    and `gradients` written, by canonical name; `bytes` are those of all of these, `flops`
    additions, multiplications, divisions and functions of one number."""

    phase: Phase
    kind: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...]
    gradients: tuple[str, ...]
    bytes: int
    flops: int


class TrainingPlan(NamedTuple):
    """A micro-step of `batch` sequences of `sequence` tokens, and an update. `buffers` has the
    bytes of each; the name of one that is kept of a layer ends with the layer's number."""

    config: ModelConfig
    batch: int
    sequence: int
    itemsize: int
    works: tuple[Work, ...]
    buffers: dict[str, int]
    recompute: Recompute = "nothing"
    logits: int = LOGITS

    @property
    def saved_bytes(self) -> int:
        """Of what the forward keeps for the backward: what belongs to a layer."""
        return sum(n for name, n in self.buffers.items() if name[-1].isdecimal())

    @property
    def batch_bytes(self) -> int:
        """Of all buffers but the logits: what is there once, and what belongs to a layer."""
        return sum(n for name, n in self.buffers.items() if name != "logits")

    @property
    def logits_bytes(self) -> int:
        """Of those that exist at once."""
        vocab_size = self.config.vocab_size
        rows = logit_rows(self.batch * self.sequence, vocab_size, self.logits)
        return rows * vocab_size * self.itemsize


class _Builder:
    def __init__(
        self, config: ModelConfig, batch: int, sequence: int, itemsize: int, recompute: Recompute
    ) -> None:
        c = config
        self.config, self.tokens, self.recompute = c, batch * sequence, recompute
        self._itemsize, self._shapes = itemsize, c.weight_shapes()
        pairs = batch * sequence * (sequence + 1) // 2  # of a query and a key that it sees
        self.attention_product = 2 * pairs * c.n_heads * c.head_dim  # operations, of all of them
        self.rotation = 3 * self.tokens * (c.q_dim + c.kv_dim)
        self.works: list[Work] = []
        self.buffers: dict[str, int] = {}

    def buffer(self, name: str, width: int, itemsize: int | None = None) -> None:
        self.buffers[name] = self.tokens * width * (itemsize or self._itemsize)

    def of_layer(self, name: str, layer: int) -> str:
        """A buffer of the layer, or of all of them where it is not kept."""
        is_kept = {
            "nothing": True, "hidden": name != "hidden", "layers": name in ("x", "normed"),
        }  # fmt: skip
        return f"{name}.{layer}" if is_kept[self.recompute] else name

    def weight_bytes(self, names: tuple[str, ...], itemsize: int) -> int:
        return sum(math.prod(self._shapes[name]) for name in names) * itemsize

    def add(
        self,
        phase: Phase,
        kind: str,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        flops: int,
        layer: int = NO_LAYER,
        weights: tuple[str, ...] = (),
        gradients: tuple[str, ...] = (),
    ) -> None:
        item = self._itemsize if kind in ("product", "loss") else FLOAT
        n_bytes = sum(self.buffers[name] for name in (*reads, *writes))
        n_bytes += self.weight_bytes(weights, item) + self.weight_bytes(gradients, FLOAT)
        work = Work(phase, kind, layer, reads, writes, weights, gradients, n_bytes, flops)
        self.works.append(work)

    def product_flops(self, names: tuple[str, ...]) -> int:
        """Of one product of all tokens with some matrices."""
        return 2 * self.tokens * sum(math.prod(self._shapes[name]) for name in names)


_ATTENTION = "layers.{}.self_attn.{}.weight"
_MLP = "layers.{}.mlp.{}.weight"


def make_training_plan(
    config: ModelConfig,
    batch: int,
    sequence: int,
    itemsize: int = 2,
    recompute: Recompute = "nothing",
    logits: int = LOGITS,
) -> TrainingPlan:
    """List the work of a micro-step and of an update, in its order; about `logits` numbers of them
    exist at once. Raises BadInput for a model whose layers are not those of Llama or Qwen3."""
    if config.extensions:
        raise BadInput(f"{config.extensions[0]}: plans of training have no work for it")
    c = config
    b = _Builder(config, batch, sequence, itemsize, recompute)
    tokens, C = batch * sequence, c.q_dim + 2 * c.kv_dim
    for i in range(c.n_layers):
        for name, width, item in (
            ("x", c.dim, FLOAT), ("normed", c.dim, 0), ("qkv", C, 0),
            ("rotated", c.q_dim + c.kv_dim if c.qk_norm else 0, 0), ("attended", c.q_dim, 0),
            ("lse", c.n_heads, FLOAT), ("middle", c.dim, FLOAT), ("normed_middle", c.dim, 0),
            ("gate_up", 2 * c.hidden_dim, 0), ("hidden", c.hidden_dim, 0),
        ):  # fmt: skip
            if width:
                b.buffer(b.of_layer(name, i), width, item or None)
    for name, width, item in (
        ("tokens", 1, 8), ("targets", 1, 8), ("last", c.dim, FLOAT), ("normed_last", c.dim, 0),
        ("delta", c.dim, 0), ("losses", 1, FLOAT), ("logits", c.vocab_size, 0),
        ("dnormed", c.dim, 0), ("dhidden", c.hidden_dim, 0), ("dx", c.dim, FLOAT),
        ("dx_rounded", c.dim, 0), ("dattended", c.q_dim, 0), ("dqkv", C, 0),
    ):  # fmt: skip
        b.buffer(name, width, item or None)
    norm, head = 4 * tokens * c.dim, "embed_tokens.weight"
    if not c.tied_embeddings:
        head = "lm_head.weight"
    b.add("forward", "embedding", ("tokens",), ("x.0",), 0)
    b.add("forward", "norm", ("x.0",), ("normed.0",), norm, 0, _norm_name(0, "input"))
    for i in range(c.n_layers):
        _forward(b, "forward", i)
        down = _matrices(i, _MLP, "down_proj")
        hidden, middle = b.of_layer("hidden", i), b.of_layer("middle", i)
        b.add("forward", "product", (hidden,), ("delta",), b.product_flops(down), i, down)
        last = i + 1 == c.n_layers
        b.add(
            "forward", "norm", (middle, "delta"),
            ("last", "normed_last") if last else (f"x.{i + 1}", f"normed.{i + 1}"),
            norm + tokens * c.dim, NO_LAYER if last else i + 1,
            ("norm.weight",) if last else _norm_name(i + 1, "input"),
        )  # fmt: skip
    of_head = b.product_flops((head,))
    b.add("loss", "product", ("normed_last",), ("logits",), of_head, weights=(head,))
    softmax = 4 * tokens * c.vocab_size
    b.add("loss", "loss", ("logits", "targets"), ("logits", "losses"), softmax)
    b.add("loss", "product", ("logits",), ("dnormed",), of_head, weights=(head,))
    b.add("loss", "weight_gradient", ("logits", "normed_last"), (), of_head, gradients=(head,))
    b.add(
        "backward", "norm", ("dnormed", "last"), ("dx", "dx_rounded"), 2 * norm,
        weights=("norm.weight",), gradients=("norm.weight",),
    )  # fmt: skip
    for i in reversed(range(c.n_layers)):
        if recompute == "layers" and i + 1 < c.n_layers:
            _forward(b, "backward", i)
        _backward(b, i)
    b.add(
        "backward", "embedding", ("dx", "tokens"), (), tokens * c.dim,
        gradients=("embed_tokens.weight",),
    )  # fmt: skip
    every = tuple(config.weight_shapes())
    elements = b.weight_bytes(every, 1)
    # gradients twice; weights and two moments read and written, and weights rounded
    b.works.append(
        Work("update", "update", NO_LAYER, (), (), every, every,
             elements * (2 * FLOAT + 6 * FLOAT + itemsize), 16 * elements)
    )  # fmt: skip
    return TrainingPlan(
        config, batch, sequence, itemsize, tuple(b.works), b.buffers, recompute, logits
    )


def _norm_name(layer: int, which: str) -> tuple[str, ...]:
    return (f"layers.{layer}.{which}_layernorm.weight",)


def _matrices(layer: int, of: str, *names: str) -> tuple[str, ...]:
    return tuple(of.format(layer, name) for name in names)


def _head_norms(config: ModelConfig, layer: int) -> tuple[str, ...]:
    return _matrices(layer, _ATTENTION, "q_norm", "k_norm") if config.qk_norm else ()


def _attention_inputs(b: _Builder, layer: int) -> tuple[str, ...]:
    """Packed rows, and rotated queries and keys where those are others."""
    qkv = b.of_layer("qkv", layer)
    return (qkv, b.of_layer("rotated", layer)) if b.config.qk_norm else (qkv,)


def _forward(b: _Builder, phase: Phase, i: int) -> None:
    """A layer, from the norm of its input to what the SwiGLU gives."""
    c, tokens = b.config, b.tokens
    qkv = _matrices(i, _ATTENTION, "q_proj", "k_proj", "v_proj")
    out, gate_up = _matrices(i, _ATTENTION, "o_proj"), _matrices(i, _MLP, "gate_proj", "up_proj")
    inputs, attended = _attention_inputs(b, i), b.of_layer("attended", i)
    middle, normed_middle = b.of_layer("middle", i), b.of_layer("normed_middle", i)
    gates_ups = b.of_layer("gate_up", i)
    b.add(phase, "product", (f"normed.{i}",), inputs[:1], b.product_flops(qkv), i, qkv)
    b.add(phase, "rotation", inputs[:1], inputs[-1:], b.rotation, i, _head_norms(c, i))
    lse = b.of_layer("lse", i)
    b.add(phase, "attention", inputs, (attended, lse), 2 * b.attention_product, i)
    b.add(phase, "product", (attended,), ("delta",), b.product_flops(out), i, out)
    b.add(
        phase, "norm", (f"x.{i}", "delta"), (middle, normed_middle), 5 * tokens * c.dim, i,
        _norm_name(i, "post_attention"),
    )  # fmt: skip
    b.add(phase, "product", (normed_middle,), (gates_ups,), b.product_flops(gate_up), i, gate_up)
    swiglu = 5 * tokens * c.hidden_dim
    b.add(phase, "swiglu", (gates_ups,), (b.of_layer("hidden", i),), swiglu, i)


def _backward(b: _Builder, i: int) -> None:
    """A layer, from the gradient of its output to that of its input."""
    c, tokens = b.config, b.tokens
    qkv = _matrices(i, _ATTENTION, "q_proj", "k_proj", "v_proj")
    out, gate_up = _matrices(i, _ATTENTION, "o_proj"), _matrices(i, _MLP, "gate_proj", "up_proj")
    down, attended = _matrices(i, _MLP, "down_proj"), b.of_layer("attended", i)
    gates_ups, hidden = b.of_layer("gate_up", i), b.of_layer("hidden", i)
    _back(b, i, ("dx_rounded",), "dhidden", down)
    once_more = (hidden,) if b.recompute == "hidden" else ()
    b.add(
        "backward", "swiglu", ("dhidden", gates_ups), (gates_ups, *once_more),
        11 * tokens * c.hidden_dim, i,
    )  # fmt: skip
    _weight(b, i, ("dx_rounded", hidden), down)
    _back(b, i, (gates_ups,), "dnormed", gate_up)
    _weight(b, i, (gates_ups, b.of_layer("normed_middle", i)), gate_up)
    _norm_back(b, i, b.of_layer("middle", i), _norm_name(i, "post_attention"))
    _back(b, i, ("dx_rounded",), "dattended", out)
    _weight(b, i, ("dx_rounded", attended), out)
    reads = ("dattended", *_attention_inputs(b, i), attended, b.of_layer("lse", i))
    norms = _head_norms(c, i)
    flops = 5 * b.attention_product + b.rotation
    b.add("backward", "attention", reads, ("dqkv",), flops, i, norms, norms)
    _back(b, i, ("dqkv",), "dnormed", qkv)
    _weight(b, i, ("dqkv", f"normed.{i}"), qkv)
    _norm_back(b, i, f"x.{i}", _norm_name(i, "input"))


def _back(b: _Builder, layer: int, reads: tuple[str, ...], to: str, names: tuple[str, ...]) -> None:
    b.add("backward", "product", reads, (to,), b.product_flops(names), layer, names)


def _weight(b: _Builder, layer: int, reads: tuple[str, ...], names: tuple[str, ...]) -> None:
    flops = b.product_flops(names)
    b.add("backward", "weight_gradient", reads, (), flops, layer, gradients=names)


def _norm_back(b: _Builder, layer: int, x: str, name: tuple[str, ...]) -> None:
    reads, writes = ("dnormed", x, "dx"), ("dx", "dx_rounded")
    b.add("backward", "norm", reads, writes, 8 * b.tokens * b.config.dim, layer, name, name)


def check_training(plan: TrainingPlan) -> None:
    """Raise PlanError where something is read that nothing has written, what is kept of a layer is
    never read again, a gradient is written by two or by none, or an update comes before one."""
    there = {"tokens", "targets"}
    kept: set[str] = set()
    gradients: dict[str, int] = dict.fromkeys(plan.config.weight_shapes(), 0)
    for work in plan.works:
        if missing := [name for name in work.reads if name not in there]:
            raise PlanError(f"{work.phase} {work.kind}: {missing[0]} is not written before")
        there.update(work.writes)
        if work.phase == "backward":
            kept.update(work.reads)
        if work.phase != "update":
            for name in work.gradients:
                gradients[name] += 1
    of_layers = {name for name in plan.buffers if name[-1].isdecimal()}
    if unread := sorted(of_layers - kept):
        raise PlanError(f"{unread[0]} is kept and not read by the backward")
    for name, count in gradients.items():
        twice = plan.config.tied_embeddings and name == "embed_tokens.weight"
        if count != 1 + twice:
            raise PlanError(f"the gradient of {name} is written {count} times")
    if [work.phase for work in plan.works].count("update") != 1 or plan.works[-1].kind != "update":
        raise PlanError("an update is the last")


def describe_training(plan: TrainingPlan) -> dict[str, Any]:
    """Sizes, and of each phase and kind how often it is, its bytes and operations."""
    c = plan.config
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for work in plan.works:
        line = lines.setdefault(
            (work.phase, work.kind),
            {"phase": work.phase, "kind": work.kind, "count": 0, "bytes": 0, "flops": 0},
        )
        line["count"] += 1
        line["bytes"] += work.bytes
        line["flops"] += work.flops
    return {
        "batch": plan.batch,
        "sequence": plan.sequence,
        "itemsize": plan.itemsize,
        "recompute": plan.recompute,
        "kinds": list(lines.values()),
        "kept": dict(_of_a_layer(plan)),
        "saved_bytes": plan.saved_bytes,
        "logits_bytes": plan.logits_bytes,
        "state_bytes": c.n_params * (4 * FLOAT + plan.itemsize),
        "flops": sum(work.flops for work in plan.works),
    }


def _of_a_layer(plan: TrainingPlan) -> Iterator[tuple[str, int]]:
    for name, n_bytes in plan.buffers.items():
        if name.endswith(".0"):
            yield name.removesuffix(".0"), n_bytes
