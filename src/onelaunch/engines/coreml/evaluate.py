"""Runs a saved ML Program on any system, operation by operation, with PyTorch on the CPU.

Three precisions: float64 and float32 throughout, whatever the program's dtypes are, and float16
rounded after every operation, each computed in float32 before that. What the Neural Engine does
within an operation, its order and width of sums, is not known here: this is the program's meaning,
not the device's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.engines.coreml.package import Function, Operation, Package, Stored
from onelaunch.errors import BadInput

Precision = Literal["float64", "float32", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float64", "float32", "float16")
Values = Mapping[str, Any]
Probe = Callable[[str], None]
"""Called with what begins now: INTERPRETING, the kind of an operation, or ROUNDING."""
INTERPRETING, ROUNDING = "interpreting", "rounding"


class Evaluator:
    """A function of a package, called with its inputs by name; returns its outputs by name.

    With `watch`, `largest` has the largest magnitude of each operation's output, by its name.
    Raises BadInput for an operation that is not known, for inputs that are missing or of another
    shape.
    """

    def __init__(
        self,
        package: Package,
        precision: Precision = "float16",
        function: str | None = None,
        watch: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise BadInput(f"precision {precision!r}: must be {', '.join(PRECISIONS)}")
        self.function: Function = package.functions[function] if function else package.main
        self.precision, self.largest = precision, dict[str, float]()
        self.probe: Probe | None = None
        """For measurements."""
        self._watch = watch
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        for operation in self.function.operations:
            if operation.kind not in KINDS:
                raise BadInput(f"{package.path}: {operation.kind} is not evaluated here")
        self._constants: dict[str, Any] = {}
        for name, constant in self.function.constants.items():
            value = package.value(constant)
            if isinstance(value, np.ndarray) and (value.ndim or isinstance(constant, Stored)):
                self._constants[name] = self._placed(value)
            else:
                self._constants[name] = value if isinstance(value, str) else value.item()
        self._last_use = _last_uses(self.function)

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        on_output: Callable[[str, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """The outputs; `on_output` is called with each as soon as it is there."""
        outputs, probe = set(self.function.outputs), self.probe
        values: dict[str, Any] = {}
        for name, expected in self.function.inputs.items():
            if name not in inputs or tuple(inputs[name].shape) != expected.shape:
                shape = tuple(inputs[name].shape) if name in inputs else "none"
                raise BadInput(f"input {name}: must be of shape {expected.shape}, not {shape}")
            values[name] = self._rounded(self._placed(inputs[name]))
        if probe is not None:
            probe(INTERPRETING)
        with torch.no_grad():
            for number, operation in enumerate(self.function.operations):
                operands = self._operands(operation, values)
                if probe is not None:
                    probe(operation.kind)
                results = KINDS[operation.kind](operands)
                if isinstance(results, Tensor):
                    results = (results,)
                for (name, _), result in zip(operation.outputs, results, strict=True):
                    if probe is not None:
                        probe(ROUNDING)
                    values[name] = self._rounded(result)
                    if probe is not None:
                        probe(INTERPRETING)
                    if on_output is not None and name in outputs:
                        on_output(name, values[name])
                    if self._watch:
                        self._note(operation.name, values[name])
                for name in self._last_use[number]:
                    values.pop(name, None)
        return {name: values[name] for name in self.function.outputs}

    def _operands(self, operation: Operation, values: Values) -> dict[str, Any]:
        """The operands by parameter; a list where the parameter is one."""
        operands = {}
        for parameter, names in operation.inputs.items():
            each = [values[n] if n in values else self._constants[n] for n in names]
            operands[parameter] = each if parameter == "values" or len(each) > 1 else each[0]
        return operands

    def _placed(self, value: Any) -> Tensor:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensor.is_floating_point():
            return tensor.to(self._dtype)
        return tensor if tensor.dtype == torch.bool else tensor.to(torch.int64)

    def _rounded(self, value: Tensor) -> Tensor:
        if self.precision == "float16" and value.is_floating_point():
            return value.half().to(self._dtype)
        return value

    def _note(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and value.numel():
            largest, before = float(value.abs().max()), self.largest.get(name, 0.0)
            if not before >= largest:  # what is no number stays
                self.largest[name] = largest if before == before else before


def _last_uses(function: Function) -> list[list[str]]:
    """The values that no later operation reads, by operation."""
    last: dict[str, int] = {}
    for number, operation in enumerate(function.operations):
        for name in (*operation.operands, *(name for name, _ in operation.outputs)):
            last[name] = number
    kept = set(function.outputs)
    unneeded: list[list[str]] = [[] for _ in function.operations]
    for name, number in last.items():
        if name not in kept and name not in function.constants:
            unneeded[number].append(name)
    return unneeded


# ---- what each kind of operation means; parameters as MIL names them


def _axes(value: Any) -> list[int]:
    return [int(v) for v in (value.tolist() if isinstance(value, Tensor) else [value])]


def _conv(p: dict[str, Any]) -> Tensor:
    weight = p["weight"]
    if weight.shape[2:] != (1, 1) or _axes(p["groups"]) != [1] or set(_axes(p["strides"])) != {1}:
        raise BadInput("conv: only 1x1, of one group and stride, is evaluated here")
    x = p["x"]
    result = torch.matmul(weight[:, :, 0, 0], x.flatten(2)).unflatten(2, x.shape[2:])
    return result if "bias" not in p else result + p["bias"].view(1, -1, 1, 1)


def _einsum(p: dict[str, Any]) -> Tensor:
    if p["equation"] != "nchw,nwhu->nchu":
        raise BadInput(f"einsum {p['equation']}: is not evaluated here")
    left, right = p["values"]
    return torch.matmul(left.transpose(1, 2), right.transpose(1, 2)).transpose(1, 2)


def _matmul(p: dict[str, Any]) -> Tensor:
    x = p["x"].transpose(-1, -2) if p.get("transpose_x") else p["x"]
    y = p["y"].transpose(-1, -2) if p.get("transpose_y") else p["y"]
    return torch.matmul(x, y)


def _slice(p: dict[str, Any]) -> Tensor:
    x = p["x"]
    begin, size = _axes(p["begin"]), _axes(p["size"])
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def _split(p: dict[str, Any]) -> tuple[Tensor, ...]:
    x, axis = p["x"], int(p["axis"])
    if "split_sizes" in p:
        return torch.split(x, _axes(p["split_sizes"]), axis)
    return torch.split(x, x.shape[axis] // int(p["num_splits"]), axis)


def _cast(p: dict[str, Any]) -> Tensor:
    x, to = p["x"], p["dtype"]
    return x.to(torch.int64) if to.startswith("int") else x.to(torch.get_default_dtype())


def _reduced(function: Callable[..., Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    def reduce(p: dict[str, Any]) -> Tensor:
        return function(p["x"], dim=_axes(p["axes"]), keepdim=bool(p["keep_dims"]))

    return reduce


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "add": lambda p: p["x"] + p["y"],
    "sub": lambda p: p["x"] - p["y"],
    "mul": lambda p: p["x"] * p["y"],
    "real_div": lambda p: p["x"] / p["y"],
    "maximum": lambda p: torch.maximum(p["x"], p["y"]),
    "abs": lambda p: p["x"].abs(),
    "ceil": lambda p: p["x"].ceil(),
    "exp2": lambda p: torch.exp2(p["x"]),
    "log": lambda p: torch.log(p["x"] + p["epsilon"]),
    "identity": lambda p: p["x"],
    "sigmoid": lambda p: torch.sigmoid(p["x"]),
    "silu": lambda p: F.silu(p["x"]),
    "rsqrt": lambda p: torch.rsqrt(p["x"] + p["epsilon"]),
    "softmax": lambda p: torch.softmax(p["x"], dim=int(p["axis"])),
    "reduce_max": _reduced(torch.amax),
    "reduce_mean": _reduced(torch.mean),
    "reduce_sum": _reduced(torch.sum),
    "conv": _conv,
    "einsum": _einsum,
    "matmul": _matmul,
    "concat": lambda p: torch.cat(p["values"], dim=int(p["axis"])),
    "split": _split,
    "slice_by_size": _slice,
    "transpose": lambda p: p["x"].permute(_axes(p["perm"])),
    "reshape": lambda p: p["x"].reshape(_axes(p["shape"])),
    "expand_dims": lambda p: _expanded(p["x"], _axes(p["axes"])),
    "gather": lambda p: torch.index_select(
        p["x"], int(p["axis"]), p["indices"].flatten()
    ).unflatten(int(p["axis"]), p["indices"].shape),
    "cast": _cast,
}


def _expanded(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x
