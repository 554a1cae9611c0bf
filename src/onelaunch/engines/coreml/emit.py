"""Lowers a plan to ML Programs: one for each launch, its weights constants.

A stage is written once and used at every fusion depth. The layout is the Neural Engine's: x is
(B, D, 1, S), positions on the last axis; a linear map is a 1x1 convolution; attention is computed
head by head, keys on the channel axis, so that the softmax is over channels and nothing is cut
along the last axis. Everything is float16.

Shapes: B batch, S sequence, D model width, H heads, K kv heads, E head width padded (pack.py), F
hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.pack import Packed, causal_mask, padded_head, rotation
from onelaunch.errors import BadInput
from onelaunch.plan import Launch, Plan, Stage, launches, parse_depth

Taps = Literal["none", "inputs", "full"]
TAPS: tuple[Taps, ...] = ("none", "inputs", "full")
"""What a program hands out for a backward pass beside its result: nothing, each layer's input, or
all that the backward of a layer reads."""
HEAD_ROWS = 65_536
"""Channels that one convolution may have; a larger head is cut."""
PURPOSE = "an ML Program"
X, TOKENS, RESULT, LOGITS = "x", "tokens", "x_out", "logits"

Var = Any
"""A value of coremltools' own representation (MIL)."""


@dataclass(frozen=True)
class Emitted:
    """A program that is not saved yet: MIL, its launch, and what emitting it took."""

    mil: Any
    launch: Launch
    seconds: float


def program_launches(plan: Plan, depth: str | int) -> tuple[Launch, ...]:
    """The launches of a plan that are programs. embed alone is none: looking rows up is the host's.
    Raises BadInput for a depth of single stages."""
    parsed = parse_depth(depth, plan.config.n_layers)
    if parsed == "stage":
        raise BadInput(
            f"fusion depth {depth}: a program holds half a layer at least; use half, a number of "
            f"layers from 1 to {plan.config.n_layers}, or all"
        )
    found = launches(plan, parsed)
    return tuple(each for each in found if _kinds(plan, each) != {"embed"})


def _kinds(plan: Plan, launch: Launch) -> set[str]:
    return {stage.kind for stage in plan.stages[launch.first : launch.last]}


def emit(plan: Plan, launch: Launch, packed: Packed, taps: Taps = "none") -> Emitted:
    """The program of one launch. Its input is `tokens`, (B, S) int32, where it begins with embed,
    and otherwise `x`, (B, D, 1, S); its result `x_out`, or `logits_0`, `logits_1` and so on, of
    (B, rows, 1, S) each; then its taps, by the names of `tap_names`."""
    coremltools(PURPOSE)
    from coremltools.converters.mil import mil

    start = time.perf_counter()
    if plan.past:
        raise BadInput("an ML Program here begins at a text's first position")
    program = mil.Program()
    emitter = _Emitter(plan, packed, taps)
    begins = plan.stages[launch.first].kind == "embed"
    shape = (plan.batch, plan.sequence)
    if begins:
        given = {TOKENS: mil.Placeholder(sym_shape=shape, dtype=mil.types.int32, name=TOKENS)}
    else:
        wide = (plan.batch, plan.config.dim, 1, plan.sequence)
        given = {X: mil.Placeholder(sym_shape=wide, dtype=mil.types.fp16, name=X)}
    from coremltools import target

    with mil.Function(given, opset_version=target.iOS18) as function:
        (emitter.x,) = function.inputs.values()
        for stage in plan.stages[launch.first : launch.last]:
            getattr(emitter, stage.kind)(stage)
        function.set_outputs(list(emitter.outputs()))
    program.add_function("main", function)
    return Emitted(program, launch, time.perf_counter() - start)


def tap_names(plan: Plan, launch: Launch, taps: Taps) -> list[str]:
    """The names of a program's taps, in their order among its outputs."""
    found = []
    for stage in plan.stages[launch.first : launch.last]:
        found += [tap_name(stage.layer, name) for name in _taps_of(stage.kind, taps)]
    return found


def tap_name(layer: int, name: str) -> str:
    """How a program calls a layer's tap."""
    return f"layer_{layer}_{name}"


_FULL = {
    "qkv": ("input", "normed", "q", "k", "v"),
    "out_proj": ("mixed",),
    "gate_up": ("middle", "normed_2", "gate", "up"),
    "down": ("hidden",),
}


def _taps_of(kind: str, taps: Taps) -> tuple[str, ...]:
    if taps == "full":
        return _FULL.get(kind, ())
    return ("input",) if taps == "inputs" and kind == "qkv" else ()


class _Emitter:
    """Writes stages one after another into the function that is open."""

    def __init__(self, plan: Plan, packed: Packed, taps: Taps) -> None:
        from coremltools.converters.mil import Builder

        self.mb: Any = Builder
        self.plan, self.config, self.packed, self.taps = plan, plan.config, packed, taps
        self.x: Var = None
        self._tapped: list[Var] = []
        self._logits: list[Var] = []
        self._shared: dict[str, Var] = {}

    # ---- the stages

    def embed(self, stage: Stage) -> None:
        mb, table = self.mb, self._constant("embed_tokens", self.packed(stage.weights[0]))
        rows_BSD = mb.gather(x=table, indices=self.x, axis=0)
        rows_BDS = mb.transpose(x=rows_BSD, perm=[0, 2, 1])
        self.x = mb.expand_dims(x=rows_BDS, axes=[2])

    def qkv(self, stage: Stage) -> None:
        mb, c, prefix = self.mb, self.config, f"layers.{stage.layer}."
        x = self._tap(stage, "input", self.x)
        normed = self._tap(stage, "normed", self._norm(x, f"{prefix}input_layernorm.weight"))
        turned = {}
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads)):
            both = self._linear(normed, f"{prefix}self_attn.{name}_proj.weight")
            first, second = mb.split(x=both, num_splits=2, axis=1)
            if c.qk_norm:
                first, second = self._head_norm(stage, name, heads, first, second)
            turned[name] = self._rotate(heads, first, second)
        v = self._linear(normed, f"{prefix}self_attn.v_proj.weight")
        if "q" in _taps_of(stage.kind, self.taps):
            for name in "qk":
                self._tap(stage, name, mb.concat(values=turned[name], axis=1))
            v = self._tap(stage, "v", v)
        self._heads = (
            self._parts(turned["q"], c.n_heads), self._parts(turned["k"], c.n_kv_heads),
            self._split(v, c.n_kv_heads),
        )  # fmt: skip

    def attention(self, stage: Stage) -> None:
        mb, c, S = self.mb, self.config, self.plan.sequence
        queries, keys, values = self._heads
        mask = self._constant("mask", causal_mask(S))
        standing = [mb.transpose(x=key, perm=[0, 3, 2, 1]) for key in keys]
        mixed = []
        for head, query in enumerate(queries):
            group = head * c.n_kv_heads // c.n_heads
            scores = mb.einsum(values=(standing[group], query), equation="nchw,nwhu->nchu")
            weights = mb.softmax(x=mb.add(x=scores, y=mask), axis=1)
            mixed.append(mb.einsum(values=(values[group], weights), equation="nchw,nwhu->nchu"))
        self._mixed = mb.concat(values=mixed, axis=1) if len(mixed) > 1 else mixed[0]

    def out_proj(self, stage: Stage) -> None:
        mixed = self._tap(stage, "mixed", self._mixed)
        self.x = self.mb.add(x=self.x, y=self._linear(mixed, stage.weights[0]))

    def gate_up(self, stage: Stage) -> None:
        mb, prefix = self.mb, f"layers.{stage.layer}."
        x = self._tap(stage, "middle", self.x)
        normed = self._norm(x, f"{prefix}post_attention_layernorm.weight")
        normed = self._tap(stage, "normed_2", normed)
        gate = self._tap(stage, "gate", self._linear(normed, f"{prefix}mlp.gate_proj.weight"))
        up = self._tap(stage, "up", self._linear(normed, f"{prefix}mlp.up_proj.weight"))
        self._hidden = mb.mul(x=mb.silu(x=gate), y=up)

    def down(self, stage: Stage) -> None:
        hidden = self._tap(stage, "hidden", self._hidden)
        self.x = self.mb.add(x=self.x, y=self._linear(hidden, stage.weights[0]))

    def head(self, stage: Stage) -> None:
        normed = self._norm(self.x, "norm.weight")
        classifier = self.packed.classifier()
        for first in range(0, len(classifier), HEAD_ROWS):
            rows = classifier[first : first + HEAD_ROWS]
            weight = self.mb.const(val=rows)
            self._logits.append(self.mb.conv(x=normed, weight=weight))

    # ---- their parts

    def outputs(self) -> Iterator[Var]:
        """Of the program, named."""
        results = [(f"{LOGITS}_{i}", v) for i, v in enumerate(self._logits)] or [(RESULT, self.x)]
        for name, var in results:
            yield self.mb.identity(x=var, name=name)
        yield from self._tapped

    def _tap(self, stage: Stage, name: str, var: Var) -> Var:
        if name in _taps_of(stage.kind, self.taps):
            self._tapped.append(self.mb.identity(x=var, name=tap_name(stage.layer, name)))
        return var

    def _constant(self, name: str, value: np.ndarray) -> Var:
        """One that several stages share."""
        if name not in self._shared:
            self._shared[name] = self.mb.const(val=value)
        return self._shared[name]

    def _linear(self, x: Var, name: str) -> Var:
        return self.mb.conv(x=x, weight=self.mb.const(val=self.packed(name)))

    def _norm(self, x: Var, name: str) -> Var:
        """x / sqrt(mean(x^2) + eps) * weight over channels; the mean, as a sum of squares would
        pass float16's range with a root mean square of 9 at 768 channels."""
        mb = self.mb
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[1], keep_dims=True)
        rooted = mb.rsqrt(x=mean, epsilon=np.float16(self.config.norm_eps))
        return mb.mul(x=mb.mul(x=x, y=rooted), y=mb.const(val=self.packed(name)))

    def _head_norm(self, stage: Stage, name: str, heads: int, *halves: Var) -> tuple[Var, Var]:
        """The norm of each head, of which two halves are given."""
        mb, half = self.mb, padded_head(self.config) // 2
        wide = (self.plan.batch, heads, half, self.plan.sequence)
        flat = (self.plan.batch, heads * half, 1, self.plan.sequence)
        by_head = [mb.reshape(x=each, shape=wide) for each in halves]
        means = [mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[2], keep_dims=True) for x in by_head]
        mean = mb.mul(x=mb.add(x=means[0], y=means[1]), y=np.float16(half / self.config.head_dim))
        rooted = mb.rsqrt(x=mean, epsilon=np.float16(self.config.norm_eps))
        weight = self.packed(f"layers.{stage.layer}.self_attn.{name}_norm.weight")
        weights = np.split(weight, 2, axis=1)
        first, second = (
            mb.mul(x=mb.reshape(x=mb.mul(x=x, y=rooted), shape=flat), y=mb.const(val=w))
            for x, w in zip(by_head, weights, strict=True)
        )
        return first, second

    def _rotate(self, heads: int, first: Var, second: Var) -> tuple[Var, Var]:
        """Rotary embedding of all heads at once."""
        mb = self.mb
        tables = rotation(self.config, heads, self.plan.sequence)
        cos, sin = (
            self._constant(f"{name} {heads}", table)
            for name, table in zip(("cos", "sin"), tables, strict=True)
        )
        return (
            mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.add(x=mb.mul(x=first, y=sin), y=mb.mul(x=second, y=cos)),
        )

    def _parts(self, halves: tuple[Var, Var], heads: int) -> list[Var]:
        """Each head, (B, E, 1, S), of the halves of all."""
        pairs = zip(*(self._split(half, heads) for half in halves), strict=True)
        return [self.mb.concat(values=pair, axis=1) for pair in pairs]

    def _split(self, x: Var, count: int) -> Sequence[Var]:
        return self.mb.split(x=x, num_splits=count, axis=1) if count > 1 else [x]


def save(emitted: Emitted, path: Path) -> float:
    """Convert a program and write it as an .mlpackage; the seconds that took."""
    ct = coremltools(PURPOSE)
    start = time.perf_counter()
    model = ct.convert(
        emitted.mil,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_units=ct.ComputeUnit.CPU_AND_NE,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    model.save(str(path))
    return time.perf_counter() - start
