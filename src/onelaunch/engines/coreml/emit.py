"""Lowers a plan to ML Programs: one for each launch, its weights constants.

A stage is written once and used at every fusion depth. The layout is the Neural Engine's: x is
(B, D, 1, S), positions on the last axis; a linear map is a 1x1 convolution; attention is computed
head by head, keys on the channel axis, so that the softmax is over channels and nothing is cut
along the last axis. Everything is float16.

Shapes: B batch, S sequence, D model width, H heads, K kv heads, E head width padded (pack.py), F
hidden width, V vocabulary.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onelaunch.compilation.background import in_a_line
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml import coremltools, one_at_a_time
from onelaunch.engines.coreml.norm import Normalized, Var, normalize
from onelaunch.engines.coreml.pack import Packed, causal_mask, padded_head, rotation
from onelaunch.errors import BadInput
from onelaunch.plan import STAGE_KINDS, Launch, Plan, Stage, launches, parse_depth

Taps = Literal["none", "inputs", "full"]
TAPS: tuple[Taps, ...] = ("none", "inputs", "full")
"""What a program hands out for a backward pass in addition to its result: nothing, each layer's
input, or all that the backward of a layer reads."""
HEAD_ROWS = 65_536
"""Channels that one convolution may have; a larger head is cut."""
PURPOSE = "an ML Program"
_WRITE_ERRORS = ("[MIL FileWriter]", "filesystem error")
"""How coremltools' native parts begin their errors about writing."""
_OVERHEAD_BYTES = 1 << 20
"""Of a package without its weights, at most."""
X, TOKENS, RESULT, LOGITS = "x", "tokens", "x_out", "logits"
HANDED = {
    name: kind.writes for name, kind in STAGE_KINDS.items() if kind.block and X not in kind.writes
}
"""What a stage hands to the next one besides x, an input or output where a program begins or ends
between the two. Of no layer by name: all layers share the program of a stage without weights."""
_TAKEN = {name: kind.reads for name, kind in STAGE_KINDS.items() if kind.block}
HEAD_AXIS = 2
"""Of the elements, where heads have an axis of their own."""


@dataclass(frozen=True)
class Emitted:
    """A program that is not saved yet: MIL, its launch, and what emitting it took."""

    mil: Any
    launch: Launch
    seconds: float

    @property
    def operations(self) -> int:
        """The number of operations without constants."""
        return sum(op.op_type != "const" for op in self.mil.functions["main"].operations)


def channels(config: ModelConfig, name: str) -> int:
    """The channels of x, or of a tap by its name without the layer."""
    E = padded_head(config)
    return {
        X: config.dim, "input": config.dim, "middle": config.dim, "normed": config.dim,
        "normed_2": config.dim, "q": config.n_heads * E, "q_raw": config.n_heads * E,
        "attn_out": config.n_heads * E, "k": config.n_kv_heads * E, "k_raw": config.n_kv_heads * E,
        "v": config.n_kv_heads * E, "gate": config.hidden_dim, "up": config.hidden_dim,
        "hidden": config.hidden_dim,
    }[name]  # fmt: skip


def program_launches(plan: Plan, depth: str | int) -> tuple[Launch, ...]:
    """The launches of a plan that are programs. embed alone is none: looking rows up is the host's.
    Raises BadInput for a depth of single stages."""
    parsed = parse_depth(depth, plan.config.n_layers)
    if parsed == "stage":
        raise BadInput(
            f"fusion_depth={depth!r}: a program holds half a layer at least; use half, a number of "
            f"layers from 1 to {plan.config.n_layers}, or all"
        )
    every = launches(plan, parsed)
    return tuple(each for each in every if _kinds(plan, each) != {"embed"})


def _kinds(plan: Plan, launch: Launch) -> set[str]:
    return {stage.kind for stage in plan.stages[launch.first : launch.last]}


@one_at_a_time
def emit(plan: Plan, launch: Launch, packed: Packed, taps: Taps = "none") -> Emitted:
    """The program of one launch. Its input is `tokens`, (B, S) int32, where it begins with embed,
    and otherwise `x`, (B, D, 1, S); its result `x_out`, or `logits_0`, `logits_1` and so on, of
    (B, rows, 1, S) each; then its taps, by the names of `tap_names`. One that begins or ends inside
    a block has as inputs or outputs what is HANDED there."""
    coremltools(PURPOSE)
    from coremltools.converters.mil import mil

    start = time.perf_counter()
    if plan.past:
        raise BadInput("an ML Program here begins at a text's first position")
    program = mil.Program()
    emitter = Emitter(plan, packed, taps)
    stages = plan.stages[launch.first : launch.last]
    shape = (plan.batch, plan.sequence)
    if stages[0].kind == "embed":
        inputs = {TOKENS: mil.Placeholder(sym_shape=shape, dtype=mil.types.int32, name=TOKENS)}
    else:
        inputs = placeholders(plan, _TAKEN.get(stages[0].kind, (X,)))
    from coremltools import target

    with mil.Function(inputs, opset_version=target.iOS18) as function:
        emitter.begin(function.inputs, stages)
        for stage in stages:
            getattr(emitter, stage.kind)(stage)
        function.set_outputs(list(emitter.outputs()))
    program.add_function("main", function)
    return Emitted(program, launch, time.perf_counter() - start)


def placeholders(
    plan: Plan, names: Sequence[str], kind: Callable[[str], str] = lambda name: name
) -> dict[str, Any]:
    """Inputs, (B, C, 1, S), with as many channels as `kind` of their name has."""
    from coremltools.converters.mil import mil

    return {
        name: mil.Placeholder(
            sym_shape=(plan.batch, channels(plan.config, kind(name)), 1, plan.sequence),
            dtype=mil.types.fp16,
            name=name,
        )
        for name in names
    }


def tap_names(plan: Plan, launch: Launch, taps: Taps) -> list[str]:
    """The names of a program's taps, in their order among its outputs."""
    stages, taken = plan.stages[launch.first : launch.last], []
    for stage in stages:
        names = _taps_of(stage.kind, taps, plan.config.qk_norm)
        taken += [tap_name(stage.layer, name) for name in names if name not in _handed(stages)]
    return taken


def _handed(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Inputs and outputs of a program of these stages that are no taps of its own."""
    return _TAKEN.get(stages[0].kind, ()) + HANDED.get(stages[-1].kind, ())


def tap_name(layer: int, name: str) -> str:
    """The name of a layer's tap in a program."""
    return f"layer_{layer}_{name}"


_FULL = {
    "qkv": ("input", "normed", "q_raw", "k_raw", "v"),
    "attention": ("q", "k"),
    "out_proj": ("attn_out",),
    "gate_up": ("middle", "normed_2", "gate", "up"),
    "down": ("hidden",),
}


def _taps_of(kind: str, taps: Taps, qk_norm: bool | str) -> tuple[str, ...]:
    if taps == "full":
        names = _FULL.get(kind, ())
        return names if qk_norm else tuple(name for name in names if not name.endswith("_raw"))
    return ("input",) if taps == "inputs" and kind == "qkv" else ()


class Builder:
    """Emits the operations that forward and backward programs share, into the open function."""

    def __init__(self, plan: Plan, packed: Packed) -> None:
        from coremltools.converters.mil import Builder as mb

        self.mb: Any = mb
        self.plan, self.config, self.packed = plan, plan.config, packed
        self.shared: dict[str, Var] = {}

    def constant(self, name: str, make: Callable[[], np.ndarray]) -> Var:
        """One that several stages share."""
        if name not in self.shared:
            self.shared[name] = self.mb.const(val=make())
        return self.shared[name]

    def mask(self) -> Var:
        """The causal mask, which is added to scores."""
        return self.constant("mask", lambda: causal_mask(self.plan.sequence))

    def rotation(self, heads: int) -> tuple[Var, Var]:
        """The tables of so many heads."""

        def table(which: int) -> np.ndarray:
            return rotation(self.config, heads, self.plan.sequence)[which]

        cos = self.constant(f"cos {heads}", lambda: table(0))
        return cos, self.constant(f"sin {heads}", lambda: table(1))

    def split(self, x: Var, count: int) -> Sequence[Var]:
        """Equal parts of the channels."""
        return self.mb.split(x=x, num_splits=count, axis=1) if count > 1 else [x]

    def joined(self, parts: Sequence[Var]) -> Var:
        """Channels one after another."""
        return self.mb.concat(values=list(parts), axis=1) if len(parts) > 1 else parts[0]

    def standing(self, x: Var) -> Var:
        """Channels and positions exchanged."""
        return self.mb.transpose(x=x, perm=[0, 3, 2, 1])

    def product(self, left: Var, right: Var) -> Var:
        """The matrix product of (B, C, 1, W) and (B, W, 1, U): (B, C, 1, U)."""
        return self.mb.einsum(values=(left, right), equation="nchw,nwhu->nchu")

    def attended(self, query: Var, key_standing: Var) -> Var:
        """A head's attention weights, keys by queries."""
        scores = self.product(key_standing, query)
        return self.mb.softmax(x=self.mb.add(x=scores, y=self.mask()), axis=1)

    def group(self, head: int) -> int:
        """The kv head of a head."""
        return head * self.config.n_kv_heads // self.config.n_heads

    def linear(self, x: Var, name: str) -> Var:
        return self.mb.conv(x=x, weight=self.mb.const(val=self.packed(name)))


class Emitter(Builder):
    """Writes a forward's stages one after another; `values` has what each layer's taps are of."""

    def __init__(self, plan: Plan, packed: Packed, taps: Taps) -> None:
        super().__init__(plan, packed)
        self.taps = taps
        self.x: Var = None
        self.values: dict[tuple[int, str], Var] = {}
        self._tapped: list[Var] = []
        self._logits: list[Var] = []
        self._no_taps: tuple[str, ...] = ()
        self._ends = ""

    def begin(self, inputs: Mapping[str, Var], stages: Sequence[Stage]) -> None:
        """Begin with the inputs of the program of these stages."""
        self._no_taps, self._ends = _handed(stages), stages[-1].kind
        self.x = inputs.get(TOKENS, inputs.get(X))
        if stages[0].kind == "attention":
            of = {"q": self.config.n_heads, "k": self.config.n_kv_heads}
            self._turned = [list(self.split(inputs[name], heads)) for name, heads in of.items()]
            self._v = inputs["v"]
        self._attn_out, self._hidden = inputs.get("attn_out"), inputs.get("hidden")

    # ---- the stages

    def embed(self, stage: Stage) -> None:
        mb, c, plan = self.mb, self.config, self.plan
        if c.tied_embeddings and c.vocab_size <= HEAD_ROWS:
            table = self.constant("classifier", self.packed.classifier)  # head has the same
        else:
            table = mb.const(val=self.packed(stage.weights[0])[:, :, None, None])
        rows = mb.gather(x=table, indices=self.x, axis=0)
        rows_BSD1 = mb.reshape(x=rows, shape=(plan.batch, plan.sequence, c.dim, 1))
        self.x = mb.transpose(x=rows_BSD1, perm=[0, 2, 3, 1])

    def qkv(self, stage: Stage) -> None:
        c, prefix = self.config, f"layers.{stage.layer}."
        x = self._tap(stage, "input", self.x)
        normed = self._tap(stage, "normed", self._norm(x, f"{prefix}input_layernorm.weight"))
        self._turned = []
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads)):
            both = self.linear(normed, f"{prefix}self_attn.{name}_proj.weight")
            if c.qk_norm:
                both = self._tap(stage, f"{name}_raw", both)
            first, second = self.split(both, 2)
            if c.qk_norm:
                first, second = self._head_norm(stage, name, heads, first, second)
            self._turned.append(self._heads(self._rotate(heads, first, second), heads))
        self._v = self._tap(stage, "v", self.linear(normed, f"{prefix}self_attn.v_proj.weight"))

    def attention(self, stage: Stage) -> None:
        queries, keys = self._turned
        if "q" in _taps_of(stage.kind, self.taps, self.config.qk_norm):
            self._tap(stage, "q", self.joined(queries))
            self._tap(stage, "k", self.joined(keys))
        self.heads = queries, keys, self.split(self._v, self.config.n_kv_heads)
        standing = [self.standing(key) for key in keys]
        attn_out = []
        for head, query in enumerate(queries):
            weights = self.attended(query, standing[self.group(head)])
            attn_out.append(self.product(self.heads[2][self.group(head)], weights))
        self._attn_out = self.joined(attn_out)

    def before_out_proj(self, stage: Stage) -> Var:
        """The input of the product."""
        return self._tap(stage, "attn_out", self._attn_out)

    def out_proj(self, stage: Stage) -> None:
        product = self.linear(self.before_out_proj(stage), stage.weights[0])
        self.x = self.mb.add(x=self.x, y=product)

    def gate_up(self, stage: Stage) -> None:
        mb, prefix = self.mb, f"layers.{stage.layer}."
        x = self._tap(stage, "middle", self.x)
        normed = self._norm(x, f"{prefix}post_attention_layernorm.weight")
        normed = self._tap(stage, "normed_2", normed)
        gate = self._tap(stage, "gate", self.linear(normed, f"{prefix}mlp.gate_proj.weight"))
        up = self._tap(stage, "up", self.linear(normed, f"{prefix}mlp.up_proj.weight"))
        self._hidden = mb.mul(x=mb.silu(x=gate), y=up)

    def before_down(self, stage: Stage) -> Var:
        """The input of the product."""
        return self._tap(stage, "hidden", self._hidden)

    def down(self, stage: Stage) -> None:
        product = self.linear(self.before_down(stage), stage.weights[0])
        self.x = self.mb.add(x=self.x, y=product)

    def head(self, stage: Stage) -> None:
        normed = self._norm(self.x, "norm.weight")
        if self.config.vocab_size <= HEAD_ROWS:
            weight = self.constant("classifier", self.packed.classifier)
            self._logits.append(self.mb.conv(x=normed, weight=weight))
            return
        classifier = self.packed.classifier()
        for first in range(0, len(classifier), HEAD_ROWS):
            weight = self.mb.const(val=classifier[first : first + HEAD_ROWS])
            self._logits.append(self.mb.conv(x=normed, weight=weight))

    # ---- their parts

    def outputs(self) -> Iterator[Var]:
        """The outputs of the program, named."""
        results = [(f"{LOGITS}_{i}", v) for i, v in enumerate(self._logits)] or [(RESULT, self.x)]
        if self._ends == "qkv":
            queries, keys = self._turned
            results = [("q", self.joined(queries)), ("k", self.joined(keys)), ("v", self._v)]
        elif self._ends == "attention":
            results = [("attn_out", self._attn_out)]
        elif self._ends == "gate_up":
            results = [("hidden", self._hidden)]
        for name, var in results:
            yield self.mb.identity(x=var, name=name)
        yield from self._tapped

    def _tap(self, stage: Stage, name: str, var: Var) -> Var:
        self.values[stage.layer, name] = var
        taps = _taps_of(stage.kind, self.taps, self.config.qk_norm)
        if name in taps and name not in self._no_taps:
            self._tapped.append(self.mb.identity(x=var, name=tap_name(stage.layer, name)))
        return var

    def _norm(self, x: Var, name: str) -> Var:
        """x / sqrt(mean(x^2) + eps) * weight over channels."""
        mb = self.mb
        (normalized,) = normalize(mb, self.config.norm_eps, [x], axis=1).parts
        return mb.mul(x=normalized, y=mb.const(val=self.packed(name)))

    def _head_norm(self, stage: Stage, name: str, heads: int, *halves: Var) -> Sequence[Var]:
        """The norm of each head, as two halves."""
        mb = self.mb
        weight = self.packed(f"layers.{stage.layer}.self_attn.{name}_norm.weight")
        return [
            mb.mul(x=flat_heads(self, x), y=mb.const(val=w))
            for x, w in zip(
                normalize_heads(self, heads, halves).parts,
                np.split(weight, 2, axis=1),
                strict=True,
            )
        ]

    def _rotate(self, heads: int, first: Var, second: Var) -> tuple[Var, Var]:
        """Rotary embedding of all heads at once."""
        mb = self.mb
        cos, sin = self.rotation(heads)
        return (
            mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.add(x=mb.mul(x=first, y=sin), y=mb.mul(x=second, y=cos)),
        )

    def _heads(self, halves: tuple[Var, Var], heads: int) -> list[Var]:
        """Each head, (B, E, 1, S), of the halves of all."""
        pairs = zip(*(self.split(half, heads) for half in halves), strict=True)
        return [self.joined(pair) for pair in pairs]


def normalize_heads(builder: Builder, heads: int, halves: Sequence[Var]) -> Normalized:
    """The norm of each head over its halves, (B, heads, E / 2, S)."""
    plan, config = builder.plan, builder.config
    wide = (plan.batch, heads, padded_head(config) // 2, plan.sequence)
    by_head = [builder.mb.reshape(x=each, shape=wide) for each in halves]
    return normalize(builder.mb, config.norm_eps, by_head, HEAD_AXIS, head_divisor(config))


def head_divisor(config: ModelConfig) -> float:
    """Elements of a head over those of its padded half."""
    return config.head_dim / (padded_head(config) // 2)


def flat_heads(builder: Builder, x: Var) -> Var:
    """(B, heads, E / 2, S) as channels."""
    batch, heads, half, sequence = x.shape
    return builder.mb.reshape(x=x, shape=(batch, heads * half, 1, sequence))


def save(emitted: Emitted, path: Path, notes: Mapping[str, str] | None = None) -> float:
    """Convert a program and write it as an .mlpackage, with notes; the seconds that took."""
    return write(emitted.mil, path, notes)


@one_at_a_time
def write(program: Any, path: Path, notes: Mapping[str, str] | None = None) -> float:
    """The same of a program of coremltools. Raises OSError where it cannot be written, with the
    folder that is full as its file name."""
    ct = coremltools(PURPOSE)
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    # coremltools keeps what it converts in the system's folder until the process ends
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
        try:
            model = ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_units=ct.ComputeUnit.CPU_AND_NE,
                skip_model_load=True,
                pass_pipeline=ct.PassPipeline.EMPTY,
                package_dir=str(Path(scratch) / "converted.mlpackage"),
            )
            model.user_defined_metadata.update(notes or {})
            model.save(str(path))
        except (OSError, RuntimeError) as error:
            raise _write_error(error, program, path.parent) from error
    return time.perf_counter() - start


def _write_error(error: OSError | RuntimeError, program: Any, folder: Path) -> Exception:
    """An OSError with the reason, for a write that failed: coremltools' native parts have an error
    of their own for it, without a reason, and shutil a list of files."""
    if isinstance(error, RuntimeError) and not str(error).startswith(_WRITE_ERRORS):
        return error
    constants = (op.val.val for op in program.functions["main"].find_ops(op_type="const"))
    needed = _OVERHEAD_BYTES + sum(getattr(value, "nbytes", 0) for value in constants)
    for place in (folder, Path(tempfile.gettempdir())):  # weights are written to the latter first
        if shutil.disk_usage(place).free < needed:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return OSError(errno.EIO, in_a_line(error), str(folder))
