"""Lint a saved program: what would keep it off Apple's Neural Engine, or slow it there.

Nothing here was measured by us. The letter next to each rule names its source:

- A: Apple, neural_engine_rules.md in apple/coreai-models, commit 86b363d
- F: ANEForge, its pages numeric-cliffs, capabilities and op-catalog
- G: ANE guide (ane-guide.readthedocs.io), chapter 3, measured on M1 and A14
- H: hollance/neural-engine, its page unsupported-layers
- M: maderix/ANE, its README
- a number: that issue or pull request of apple/coremltools

Core ML decides when it loads a program where each part runs, and leaves small programs on the CPU,
below a cost that Apple has not published. So a program without findings may still not run there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from onelaunch.engines.coreml.package import (
    FLOAT16,
    FLOAT16_MAX,
    FLOAT32,
    Constant,
    Function,
    Operation,
    Package,
    Stored,
    Type,
)

Severity = Literal["error", "cpu", "slow", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "cpu", "slow", "note")
"""The program does not run there, or computes wrong numbers; this part goes to the CPU or GPU; it
is slower than it need be; worth knowing."""

MAX_RANK = 5  # A
LAST_AXIS_BYTES = 64  # A
MAX_EXTENT = 65_536  # F
OLD_MAX_EXTENT = 16_384  # of height, width and what is summed over, before A16: F
WIDTH_SLICE_MAX = 4_094  # of what is cut, before A16: a sixteenth of float16's end: F, G
PRODUCT_MAX = 32_752  # the last float16 before 2^15: F, G
WEIGHT_FILE_MAX = 2_147_483_648  # bytes: 2593
IPHONE_MAX = 1_000_000_000  # bytes of weights: coremltools' guide
STATE_STEP = 32  # 2631

_ITEM_BYTES = {FLOAT16: 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1}
"""Of the dtypes that the Neural Engine takes: A, F."""

_NO_FORM = "has no form on the Neural Engine"
_LOOK_UP = "looks up by index on the CPU, as an embedding within a program does"
_OFF: dict[str, str] = {
    **dict.fromkeys(("gather", "gather_nd", "gather_along_axis"), _LOOK_UP),  # F, H
    **dict.fromkeys(("rnn", "lstm", "gru", "custom_layer"), _NO_FORM),  # F, H
    **dict.fromkeys(("topk", "argsort"), f"{_NO_FORM} before A14"),  # F
    **dict.fromkeys(("sin", "cos", "random_uniform"), f"{_NO_FORM} before A15"),  # F
    **dict.fromkeys(
        (
            "acos", "acosh", "asin", "asinh", "atanh", "band_part", "cosh", "cumsum", "logical_and",
            "logical_or", "logical_xor", "mod", "non_maximum_suppression", "non_zero", "one_hot",
            "random_bernoulli", "random_categorical", "random_normal", "range_1d", "reduce_prod",
            "reverse_sequence", "scatter", "scatter_along_axis", "scatter_nd", "shape", "sinh",
            "sliding_windows", "tan",
        ),
        _NO_FORM,
    ),  # F
}  # fmt: skip
"""Kinds that go to the CPU or GPU, and why."""

_PRODUCTS = ("conv", "conv_transpose", "einsum", "linear", "matmul", "scaled_dot_product_attention")
"""Kinds whose results pass through the accumulator: G."""
_CHUNK = 1 << 22
"""Numbers of a constant that are looked at together."""


@dataclass(frozen=True)
class Finding:
    """A remark on `count` operations, values or constants, of which `operation` is the first."""

    severity: Severity
    operation: str
    rule: str
    text: str
    count: int = 1

    def __str__(self) -> str:
        more = f" and {self.count - 1:,} more" if self.count > 1 else ""
        return f"{self.severity}: {self.operation}{more}: {self.text}"


def lint(package: Package) -> list[Finding]:
    """The findings of a program in its order; what several places share is one finding. Raises
    BadInput for damaged weights."""
    findings = []
    fits: dict[Stored, bool] = {}
    for name, function in package.functions.items():
        prefix = f"{name}." if len(package.functions) > 1 else ""
        for where, remark in _of_function(package, function, fits):
            findings.append(Finding(remark.severity, prefix + where, remark.rule, remark.text))
    for remark in _of_weights(package.weight_file_bytes):
        findings.append(
            Finding(remark.severity, package.weights_path.name, remark.rule, remark.text)
        )
    return _grouped(findings, lambda finding: (finding.severity, finding.rule, finding.text))


def magnitudes(function: Function, largest: Mapping[str, float]) -> list[Finding]:
    """Find values beyond the range of the Neural Engine, in the function's order. `largest` has the
    largest magnitude of each operation's output, by its name, as an Evaluator with `watch` has
    it."""
    findings = []
    for operation in function.operations:
        value = largest.get(operation.name, 0.0)
        if not value <= FLOAT16_MAX:  # no number is none of these
            limit, what = FLOAT16_MAX, "float16 ends at"
        elif value > PRODUCT_MAX and operation.kind in _PRODUCTS:
            limit, what = PRODUCT_MAX, "a product or convolution is infinite beyond"
        elif value > WIDTH_SLICE_MAX and _cut(_Place(function, operation)) == "within":
            limit, what = WIDTH_SLICE_MAX, "before A16 a slice of the last axis is infinite beyond"
        else:
            continue
        text = f"gives up to {value:,.0f}; {what} {limit:,}"
        findings.append(Finding("error", operation.name, f"magnitude {limit}", text))
    return _grouped(findings, lambda finding: finding.rule)


def _grouped(findings: Iterable[Finding], key: Callable[[Finding], Any]) -> list[Finding]:
    groups: dict[Any, Finding] = {}
    for finding in findings:
        first = groups.get(key(finding))
        groups[key(finding)] = replace(first, count=first.count + 1) if first else finding
    return list(groups.values())


class _Remark(NamedTuple):
    severity: Severity
    rule: str
    text: str


Remarks = Iterator[_Remark]


def _of_function(
    package: Package, function: Function, fits: dict[Stored, bool]
) -> Iterator[tuple[str, _Remark]]:
    """Each remark with the name of what it is on. `fits` keeps which constants are in range."""
    seen = set()
    for name, kind in function.inputs.items():
        yield from ((name, remark) for remark in _of_value(kind, outer=True))
    for name, kind in function.states.items():
        yield from ((name, remark) for remark in _of_state(kind))
    for operation in function.operations:
        for name in operation.operands:
            if name in function.constants and name not in seen:
                seen.add(name)
                if not _fits(package, function.constants[name], fits):
                    yield name, _OUT_OF_RANGE
        place = _Place(function, operation)
        for rule in _RULES:
            yield from ((operation.name, remark) for remark in rule(place))
        for name, kind in operation.outputs:
            outer = name in function.outputs
            if outer or not operation.kind.startswith("constexpr_"):
                off = operation.kind in _OFF
                yield from ((name, remark) for remark in _of_value(kind, outer, off))


# ---- values


def _of_value(kind: Type, outer: bool, off: bool = False) -> Remarks:
    """Remarks on a value that is an input or output of the function, or an operation's own; `off`
    where that operation does not run there anyway."""
    if len(kind.shape) > MAX_RANK:
        yield _Remark("error", "rank", f"has {len(kind.shape)} axes; {MAX_RANK} are the most")
    if outer and kind.dtype not in _ITEM_BYTES:
        text = f"is an input or output of {kind.dtype}, which the CPU converts"
        yield _Remark("cpu", "dtype", text)
    elif kind.dtype not in (*_ITEM_BYTES, "bool") and not off:
        yield _Remark("cpu", "dtype", f"is {kind.dtype}, computed on the CPU or GPU")
    yield from _of_last_axis(kind, outer)
    yield from _of_extents(kind.shape)


def _of_last_axis(kind: Type, outer: bool) -> Remarks:
    """A: memory is in blocks of 64 bytes along it. Of what a program keeps to itself only less
    than one block is reported."""
    size = _ITEM_BYTES.get(kind.dtype, 0) * (kind.shape[-1] if kind.shape else 0)
    padded = -(-size // LAST_AXIS_BYTES) * LAST_AXIS_BYTES
    if size == padded or (padded > LAST_AXIS_BYTES and not outer):
        return
    text = f"its last axis of {kind.shape[-1]} is padded to {padded // _ITEM_BYTES[kind.dtype]}, "
    text += f"{padded / size:.3g} times the bytes"
    yield _Remark("slow" if padded == LAST_AXIS_BYTES else "note", "last axis", text)


def _of_extents(shape: tuple[int, ...]) -> Remarks:
    """F. Channels, and whatever is before the last two axes, may have the larger extent on every
    chip; ANEMLL and others cut a vocabulary at the smaller one nevertheless."""
    for axis, extent in enumerate(shape):
        if extent > MAX_EXTENT:
            yield _Remark("error", "extent", f"an axis of {extent:,} is longer than {MAX_EXTENT:,}")
        elif extent > OLD_MAX_EXTENT:
            text = f"an axis of {extent:,} is longer than {OLD_MAX_EXTENT:,}"
            if axis >= len(shape) - 2:
                text += ", the most of the last two before A16"
                yield _Remark("error", "extent", text)
            else:
                text += ", where others cut channels"
                yield _Remark("note", "extent", text)


def _of_state(kind: Type) -> Remarks:
    text = "programs with states have failed on the Neural Engine (coremltools 2553)"
    yield _Remark("note", "state", text)
    if kind.shape and kind.shape[-1] % STATE_STEP:
        text = f"a state's last axis of {kind.shape[-1]} is no multiple of {STATE_STEP}"
        yield _Remark("error", "state", f"{text} (coremltools 2631)")


# ---- constants and files

_OUT_OF_RANGE = _Remark(
    "error",
    "constant",
    f"has a number that is infinite, NaN or beyond {FLOAT16_MAX:,}; for a mask -40,000 does",
)  # A


def _fits(package: Package, constant: Constant, known: dict[Stored, bool]) -> bool:
    """Whether all of a constant's numbers are float16's. A large one is read piece by piece."""
    if isinstance(constant, Stored):
        if constant.type.dtype not in (FLOAT16, FLOAT32):
            return True
        if constant not in known:
            known[constant] = _in_range(package.value(constant))
        return known[constant]
    return isinstance(constant, str) or constant.dtype.kind != "f" or _in_range(constant)


def _in_range(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    for first in range(0, len(flat), _CHUNK):
        largest = float(np.abs(flat[first : first + _CHUNK]).max())
        if not largest <= FLOAT16_MAX:
            return False
    return True


def _of_weights(n_bytes: int) -> Remarks:
    if n_bytes > WEIGHT_FILE_MAX:
        text = f"{n_bytes:,} bytes of weights; {WEIGHT_FILE_MAX:,} are the most (coremltools 2593)"
        yield _Remark("error", "weights", text)
    elif n_bytes > IPHONE_MAX:
        text = f"{n_bytes:,} bytes of weights; an iPhone takes {IPHONE_MAX:,}"
        yield _Remark("note", "weights", text)


# ---- operations


@dataclass(frozen=True)
class _Place:
    """An operation in its function."""

    function: Function
    operation: Operation

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of an operand; empty where it has none."""
        for name in self.operation.inputs.get(parameter, ())[:1]:
            constant = self.function.constants.get(name)
            if isinstance(constant, Stored):
                return constant.type.shape
            if isinstance(constant, np.ndarray):
                return constant.shape
            if name in self.function.types:
                return self.function.types[name].shape
        return ()

    def numbers(self, parameter: str) -> list[Any]:
        """A constant that is written in place; empty where it is none."""
        for name in self.operation.inputs.get(parameter, ())[:1]:
            constant = self.function.constants.get(name)
            if isinstance(constant, np.ndarray):
                return list(constant.reshape(-1).tolist())
        return []


def _of_kind(place: _Place) -> Remarks:
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    kind = place.operation.kind
    if kind in _OFF:
        yield _Remark("cpu", "operation", f"{kind} {_OFF[kind]}")
    elif kind not in SSAOpRegistry.core_ops and kind != "write_state":
        yield _Remark("note", "operation", f"{kind} is not known here")
    elif kind == "linear":
        text = "linear may be taken apart and fall to the CPU; a 1x1 convolution is native"
        yield _Remark("slow", "operation", text)  # A
    elif kind == "conv" and any(step != 1 for step in place.numbers("dilations")):
        text = "a dilated convolution goes to the CPU or GPU, or is slow"
        yield _Remark("cpu", "operation", text)  # H; A has it slow where the step is large


def _of_attention(place: _Place) -> Remarks:
    if place.operation.kind != "scaled_dot_product_attention":
        return
    if place.operation.inputs.get("attn_mask"):
        text = "scaled_dot_product_attention ran without its mask there"
        yield _Remark("error", "attention", text)  # M
    shape = place.shape("query")
    heads, positions, width = shape[-3:] if len(shape) > 3 else (1, 0, 0)
    if heads < 64 or positions < 496 or width != 64:
        text = "scaled_dot_product_attention goes there from 64 heads of 64 and 496 positions on"
        yield _Remark("cpu", "attention", text)  # F


def _of_slice(place: _Place) -> Remarks:
    """A: what touches the last axis writes all anew. F, G: a slice that begins within it goes
    through a copy that multiplies by 16 first."""
    cut = _cut(place)
    if cut == "none":
        return
    text = f"{place.operation.kind} cuts the last axis"
    if cut == "within":
        text += f"; before A16 what is beyond {WIDTH_SLICE_MAX:,} becomes infinite"
    yield _Remark("slow", "width slice", text)


def _cut(place: _Place) -> Literal["none", "start", "within"]:
    """Whether an operation takes a part of the last axis: its start, or one that begins within."""
    operation, shape = place.operation, place.shape("x")
    kind, last = operation.kind, len(shape) - 1
    if kind not in ("slice_by_index", "slice_by_size", "split") or not shape:
        return "none"
    results = [result.shape for _, result in operation.outputs]
    if kind == "split":
        axis = place.numbers("axis")
        along = bool(axis) and axis[0] % len(shape) == last
        return "within" if along and len(results) > 1 else "none"
    squeezed = place.numbers("squeeze_mask")[last:] == [True]
    if not squeezed and all(result[-1:] == shape[-1:] for result in results):
        return "none"
    if place.numbers("begin_mask")[last:] == [True]:
        return "start"
    begin = place.numbers("begin")[last:]
    return "start" if begin in ([0], [-shape[-1]]) else "within"


def _of_layout(place: _Place) -> Remarks:
    """A."""
    kind, shape = place.operation.kind, place.shape("x")
    rank = len(shape)
    if kind == "transpose":
        moved = rank > 0 and place.numbers("perm")[-1:] not in ([rank - 1], [-1])
    elif kind == "reshape":
        moved = any(result.shape[-1:] != shape[-1:] for _, result in place.operation.outputs)
    else:
        moved = False
    if moved:
        text = f"{kind} changes the last axis: all of it is written anew"
        yield _Remark("slow", "layout", text)
    axis = place.numbers("axis")
    if kind == "softmax" and rank > 2 and axis and axis[0] % rank >= rank - 2:
        text = "softmax over one of the last two axes is divided less well than over channels"
        yield _Remark("slow", "layout", text)


_RULES: tuple[Callable[[_Place], Remarks], ...] = (
    _of_kind,
    _of_attention,
    _of_slice,
    _of_layout,
)
