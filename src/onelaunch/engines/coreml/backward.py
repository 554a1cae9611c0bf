"""Backward programs of the same plan: from the gradient of a launch's outputs to that of its
inputs, through as many layers as the launch holds, weights constants again.

A program's inputs are `dx`, the gradient of its last layer's output, (B, D, 1, S), and the
forward's taps that it reads; its outputs `dx_in`, the gradient of its first layer's input, and for
each layer the gradients of which the weights' own are products (gradients.py). With taps "inputs"
it computes each layer's forward again and returns what those products need of it, too. embed and
head are the host's.

Of P, attention weights keys by queries, and their gradient dP: the scores' is
P (dP - sum over keys of P dP). Of x / rms(x) * weight the input's is
(g - xhat mean(g xhat)) / rms(x), with g the output's gradient times the weight.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from onelaunch.engines.coreml import coremltools, one_at_a_time
from onelaunch.engines.coreml.emit import (
    HANDED,
    HEAD_AXIS,
    PURPOSE,
    Builder,
    Emitted,
    Emitter,
    Taps,
    X,
    flat_heads,
    head_divisor,
    normalize_heads,
    placeholders,
    tap_name,
)
from onelaunch.engines.coreml.norm import Var, normalize, normalize_backward
from onelaunch.engines.coreml.pack import Packed, padded_head
from onelaunch.errors import BadInput
from onelaunch.plan import NO_LAYER, STAGE_KINDS, Launch, Plan, Stage

DX, DX_IN = "dx", "dx_in"


def _gradients(values: Sequence[str]) -> tuple[str, ...]:
    """Names of gradients of what stages hand to one another; those of the heads' queries, keys and
    values are not the products' yet."""
    of_heads = STAGE_KINDS["attention"].reads
    return tuple(f"d_heads_{v}" if v in of_heads else f"d_{v}" for v in values if v != X)


BACK = {
    name: _gradients(kind.reads)
    for name, kind in STAGE_KINDS.items()
    if kind.block and _gradients(kind.reads)
}
"""What the backward of a stage hands on besides the gradient of x, where a program ends there."""
_TAKEN = {
    name: ((DX,) if X in kind.reads + kind.writes else ()) + _gradients(kind.writes)
    for name, kind in STAGE_KINDS.items()
    if kind.block
}
BEGINS = {
    name: kind.saved[0] for name, kind in STAGE_KINDS.items() if kind.block and kind.reads == (X,)
}
"""Where a block is computed again from."""


def backward_inputs(plan: Plan, launch: Launch, taps: Taps) -> list[str]:
    """The names of a backward program's inputs. The taps of a program of attention alone have no
    layer in their names."""
    stages = plan.stages[launch.first : launch.last]
    inputs = list(_TAKEN.get(stages[-1].kind, (DX,)))
    alone = len(stages) == 1 and stages[0].kind == "attention"
    for number, stage in enumerate(stages):
        names: tuple[str, ...] = STAGE_KINDS[stage.kind].saved
        if taps == "inputs":
            first = number == 0 or stage.kind == "qkv"
            names = (BEGINS[stage.kind],) if stage.kind in BEGINS and first else ()
        if not plan.config.qk_norm:
            names = tuple(name for name in names if not name.endswith("_raw"))
        inputs += names if alone else [tap_name(stage.layer, name) for name in names]
    return inputs


@one_at_a_time
def emit_backward(plan: Plan, launch: Launch, packed: Packed, taps: Taps = "full") -> Emitted:
    """The backward of a launch of whole blocks of layers, or with taps "full" of single stages.
    Raises BadInput for one that holds embed or head, and for taps "none", of which there is
    none."""
    coremltools(PURPOSE)
    from coremltools import target
    from coremltools.converters.mil import mil

    start = time.perf_counter()
    stages = plan.stages[launch.first : launch.last]
    if any(stage.layer == NO_LAYER for stage in stages):
        raise BadInput("a backward program is of layers; embed and head have theirs on the host")
    if taps == "none":
        raise BadInput("without taps there is no backward; use inputs or full")
    if taps == "inputs" and (stages[0].kind not in BEGINS or stages[-1].kind in HANDED):
        raise BadInput("only whole blocks can be computed again from their inputs; use taps full")
    program = mil.Program()
    emitter = _Backward(plan, packed)
    inputs = placeholders(plan, backward_inputs(plan, launch, taps), _kind)
    with mil.Function(inputs, opset_version=target.iOS18) as function:
        emitter.begin(function.inputs, stages, again=taps == "inputs")
        for stage in reversed(stages):
            getattr(emitter, stage.kind)(stage)
        function.set_outputs(list(emitter.outputs()))
    program.add_function("main", function)
    return Emitted(program, launch, time.perf_counter() - start)


def _kind(name: str) -> str:
    """The tensor that an input is, or is the gradient of."""
    if name == DX:
        return X
    if name.startswith("layer_"):
        return name.split("_", 2)[2]
    return name.removeprefix("d_").removeprefix("heads_")


class _Backward(Builder):
    """Writes the backward of stages, the last one first."""

    def begin(self, inputs: dict[str, Var], stages: Sequence[Stage], again: bool) -> None:
        """Take the inputs, or compute from them what was not kept."""
        self.dx = self._upstream = inputs.get(DX)
        self._ends = stages[0].kind
        self._named: list[tuple[str, Var]] = []
        self._values: dict[tuple[int, str], Var] = {}
        for stage in stages:
            for name in STAGE_KINDS[stage.kind].saved:
                if (tap := tap_name(stage.layer, name)) in inputs or (tap := name) in inputs:
                    self._values[stage.layer, name] = inputs[tap]
        self._attention: dict[int, Any] = {}
        self._d_hidden, self._d_attn_out = inputs.get("d_hidden"), inputs.get("d_attn_out")
        if stages[-1].kind == "qkv":
            d_q, d_k, self._d_v = (inputs[name] for name in BACK["attention"])
            c = self.config
            self._d_heads: tuple[Sequence[Var], Sequence[Var]] = (
                self.split(d_q, c.n_heads),
                self.split(d_k, c.n_kv_heads),
            )
        if again:
            self._again(inputs, stages)

    def _again(self, inputs: dict[str, Var], stages: Sequence[Stage]) -> None:
        forward = Emitter(self.plan, self.packed, "none")
        forward.shared = self.shared
        for stage in stages:
            begins = BEGINS.get(stage.kind)
            if begins and (tap := tap_name(stage.layer, begins)) in inputs:
                forward.x = inputs[tap]
            # a layer's output is not an input here
            unread = stage.kind == "down" or stage is stages[-1]
            getattr(forward, f"before_{stage.kind}" if unread else stage.kind)(stage)
            if stage.kind == "attention":
                self._attention[stage.layer] = forward.heads
            for name in STAGE_KINDS[stage.kind].operands:
                tap, value = tap_name(stage.layer, name), forward.values.get((stage.layer, name))
                if value is not None and tap not in inputs:
                    self._named.append((tap, value))
        self._values |= forward.values

    def outputs(self) -> list[Var]:
        """The outputs of the program, named."""
        results = [(DX_IN, self.dx)]
        if self._ends == "attention":
            d_q, d_k = (self.joined(each) for each in self._d_heads)
            results = list(zip(BACK["attention"], (d_q, d_k, self._d_v), strict=True))
        elif self._ends in BACK:
            (name,) = BACK[self._ends]
            results = [(name, self._d_hidden if self._ends == "down" else self._d_attn_out)]
        return [self.mb.identity(x=var, name=name) for name, var in results + self._named]

    # ---- the stages

    def down(self, stage: Stage) -> None:
        self._gradient(stage, "d_out", self.dx)
        self._d_hidden = self._linear_back(self.dx, stage.weights[0])

    def gate_up(self, stage: Stage) -> None:
        mb, prefix = self.mb, f"layers.{stage.layer}."
        gate, up = (self._values[stage.layer, name] for name in ("gate", "up"))
        sigmoid = mb.sigmoid(x=gate)
        silu = mb.mul(x=gate, y=sigmoid)
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = mb.add(x=sigmoid, y=mb.sub(x=silu, y=mb.mul(x=silu, y=sigmoid)))
        d_up = self._gradient(stage, "d_up", mb.mul(x=self._d_hidden, y=silu))
        d_gate = mb.mul(x=mb.mul(x=self._d_hidden, y=up), y=slope)
        d_gate = self._gradient(stage, "d_gate", d_gate)
        d_normed = mb.add(
            x=self._linear_back(d_gate, f"{prefix}mlp.gate_proj.weight"),
            y=self._linear_back(d_up, f"{prefix}mlp.up_proj.weight"),
        )
        d_normed = self._gradient(stage, "d_normed_2", d_normed)
        weight = f"{prefix}post_attention_layernorm.weight"
        middle = self._values[stage.layer, "middle"]
        self.dx = mb.add(x=self.dx, y=self._norm_back(middle, d_normed, weight))

    def out_proj(self, stage: Stage) -> None:
        self._gradient(stage, "d_middle", self.dx)
        self._d_attn_out = self._linear_back(self.dx, stage.weights[0])

    def attention(self, stage: Stage) -> None:
        mb, c = self.mb, self.config
        queries, keys, values = self._attention.get(stage.layer) or (
            self.split(self._values[stage.layer, name], heads)
            for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads))
        )
        standing_k, standing_v = ([self.standing(x) for x in each] for each in (keys, values))
        d_q: list[Var] = []
        d_k: list[Var] = [None] * c.n_kv_heads
        d_v: list[Var] = [None] * c.n_kv_heads
        for head, d_attn_out in enumerate(self.split(self._d_attn_out, c.n_heads)):
            group = self.group(head)
            weights = self.attended(queries[head], standing_k[group])
            d_weights = self.product(standing_v[group], d_attn_out)
            weighted = mb.mul(x=weights, y=d_weights)
            total = mb.reduce_sum(x=weighted, axes=[1], keep_dims=True)
            d_scores = mb.sub(x=weighted, y=mb.mul(x=weights, y=total))
            d_q.append(self.product(keys[group], d_scores))
            d_k[group] = self._sum(d_k[group], self.product(queries[head], self.standing(d_scores)))
            d_v[group] = self._sum(d_v[group], self.product(d_attn_out, self.standing(weights)))
        self._d_heads = d_q, d_k
        self._d_v = self.joined(d_v)

    def qkv(self, stage: Stage) -> None:
        c, prefix = self.config, f"layers.{stage.layer}."
        d_normed: Var = None
        for name, heads, d_heads in zip(
            "qk", (c.n_heads, c.n_kv_heads), self._d_heads, strict=True
        ):
            first, second = self._rotate_back(heads, d_heads)
            if c.qk_norm:
                self._gradient(stage, f"d_{name}_normed", self.joined((first, second)))
                first, second = self._head_norm_back(stage, name, heads, first, second)
            d_projected = self._gradient(stage, f"d_{name}", self.joined((first, second)))
            back = self._linear_back(d_projected, f"{prefix}self_attn.{name}_proj.weight")
            d_normed = self._sum(d_normed, back)
        d_v = self._gradient(stage, "d_v", self._d_v)
        d_normed = self._sum(d_normed, self._linear_back(d_v, f"{prefix}self_attn.v_proj.weight"))
        d_normed = self._gradient(stage, "d_normed", d_normed)
        weight = f"{prefix}input_layernorm.weight"
        back = self._norm_back(self._values[stage.layer, "input"], d_normed, weight)
        self.dx = self.mb.add(x=self.dx, y=back)

    # ---- their parts

    def _gradient(self, stage: Stage, name: str, var: Var) -> Var:
        """Hand it out; what came in is known to the host."""
        if var is not self._upstream:
            self._named.append((tap_name(stage.layer, name), var))
        return var

    def _sum(self, one: Var, other: Var) -> Var:
        return other if one is None else self.mb.add(x=one, y=other)

    def _linear_back(self, d_out: Var, name: str) -> Var:
        weight = self.packed(name).transpose(1, 0, 2, 3)
        return self.mb.conv(x=d_out, weight=self.mb.const(val=weight.copy()))

    def _norm_back(self, x: Var, d_out: Var, name: str) -> Var:
        mb = self.mb
        norm = normalize(mb, self.config.norm_eps, [x], axis=1)
        weighted = mb.mul(x=d_out, y=mb.const(val=self.packed(name)))
        (dx,) = normalize_backward(mb, norm, [weighted], axis=1)
        return dx

    def _rotate_back(self, heads: int, d_heads: Sequence[Var]) -> tuple[Var, Var]:
        """From each head's gradient to those of the halves of all, before the rotation."""
        mb = self.mb
        cos, sin = self.rotation(heads)
        halves = [self.split(each, 2) for each in d_heads]
        first, second = (self.joined([half[i] for half in halves]) for i in (0, 1))
        return (
            mb.add(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.sub(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin)),
        )

    def _head_norm_back(
        self, stage: Stage, name: str, heads: int, *d_halves: Var
    ) -> tuple[Var, Var]:
        mb, half = self.mb, padded_head(self.config) // 2
        raw = self._values[stage.layer, f"{name}_raw"]
        norm = normalize_heads(self, heads, self.split(raw, 2))
        weight = self.packed(f"layers.{stage.layer}.self_attn.{name}_norm.weight")
        wide = (self.plan.batch, heads, half, self.plan.sequence)
        weighted = []
        for i, d_half in enumerate(d_halves):
            part = weight[:, i * heads * half : (i + 1) * heads * half]
            product = mb.mul(x=d_half, y=mb.const(val=part.copy()))
            weighted.append(mb.reshape(x=product, shape=wide))
        divisor = head_divisor(self.config)
        halves = normalize_backward(mb, norm, weighted, HEAD_AXIS, divisor)
        first, second = (flat_heads(self, each) for each in halves)
        return first, second
