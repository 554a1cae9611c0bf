"""Launch the RMSNorm kernels on tensors.

Plan, row layout and compiled kernels of a shape are prepared once; later calls look them up by
shape, dtype, strides and alignment.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from onelaunch.operators.devices import multiprocessors
from onelaunch.operators.empty import Empty
from onelaunch.operators.guards import Recent
from onelaunch.operators.handles import bind, dependent_launch
from onelaunch.operators.rms_norm.plan import (
    MAX_COLUMNS,
    ROW_MODES,
    RULES,
    Plan,
    backward_plan,
    forward_plan,
    reduce_plan,
)
from onelaunch.operators.rms_norm.reference import CASTINGS
from onelaunch.operators.rms_norm.rows import RowLayout, row_layout
from onelaunch.operators.sequence import Step, sequence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = find_spec("triton") is not None
# Triton reads this when it is imported; its interpreter runs kernels on CPU tensors, slowly.
_TRUE = ("1", "true", "yes", "on", "y")
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE
_failed: set[torch.device] = set()  # devices for which a kernel did not compile
# Most shapes cached at once: sequences of every length would fill the memory.
MAX_CACHED_SHAPES = 4096


@dataclass(eq=False)
class Settings:
    """The validated options of a call, with a cache of prepared launches by shape."""

    eps: float
    casting: str
    offset: float
    in_place: bool
    row_mode: str
    rule: str
    prepared: dict[Any, Prepared] = field(default_factory=dict, repr=False)
    # By guards of x and a weight, the newest first, and whether either requires a gradient.
    recent: Recent[bool, Prepared] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("casting", self.casting, CASTINGS),
            ("row_mode", self.row_mode, ROW_MODES),
            ("rule", self.rule, RULES),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for name, number in (("eps", self.eps), ("offset", self.offset)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a number, not {number!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be 0 or more, not {self.eps}")

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.eps, self.casting, self.offset, self.in_place, self.row_mode, self.rule)
        return settings, values  # copies and pickles drop the cached kernels


def settings(
    eps: float, casting: str, offset: float, in_place: bool, row_mode: str, rule: str
) -> Settings:
    """Return the cached settings of these values; raises ValueError or TypeError for a bad one."""
    key = (eps, casting, offset, in_place, row_mode, rule)
    cached = _settings.get(key)
    if cached is None:
        cached = Settings(*key)
        _store(_settings, key, cached)
    return cached


_settings: dict[tuple[object, ...], Settings] = {}


def check(x: Tensor, weight: Tensor | None, offset: float) -> None:
    """Raise TypeError or ValueError for tensors on which rms_norm is not defined."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor is None and name == "weight":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rms_norm: {name} must be a tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"rms_norm: {name} must be of a floating dtype, not {tensor.dtype}")
    if x.dim() == 0:
        raise ValueError("rms_norm: x has no axis to normalize")
    if x.shape[-1] == 0:
        raise ValueError(f"rms_norm: x of shape {tuple(x.shape)} has empty rows")
    if weight is None:
        if offset:
            raise ValueError("rms_norm: offset needs a weight; pass a weight or offset=0")
        return
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; x needs ({x.shape[-1]},)"
        )
    if weight.device != x.device:
        raise ValueError(f"rms_norm: x is on {x.device}, weight on {weight.device}")


def available(device: torch.device) -> bool:
    """Return whether a device has kernels: Triton is installed, and it is a GPU of NVIDIA, AMD or
    Intel, or Triton's interpreter is on."""
    if device.type == "cpu":
        return INTERPRETED
    return device.type in ("cuda", "xpu") and HAS_TRITON


def supported(x: Tensor, weight: Tensor | None) -> bool:
    """Return whether the kernels support these tensors; the plain form serves all others."""
    if not available(x.device) or x.device in _failed:
        return False
    if x.dtype not in DTYPES or x.shape[-1] > MAX_COLUMNS:
        return False
    return weight is None or weight.dtype in DTYPES


def check_gradient(dy: Tensor, x: Tensor) -> None:
    """Raise ValueError unless dy can be the gradient of y."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"rms_norm: the gradient is {_describe(dy)}, x is {_describe(x)}: they must agree"
        )


class Prepared:
    """The prepared launches of one shape, dtype and layout of x and weight.

    `forward(x, weight)` launches; `backward` caches launches by the layout of the gradient.
    `recent_backward` caches them by guards of dY, x and a weight, the newest first, and whether dW
    is needed; sequence.c reads it.
    """

    __slots__ = ("backward", "forward", "recent_backward", "s")

    def __init__(self, s: Settings, forward: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.s = s
        self.forward = forward
        self.backward: dict[Any, Any] = {}
        self.recent_backward: Recent[bool, Callable[..., tuple[Tensor, Tensor | None]]] = ()


def prepare(x: Tensor, weight: Tensor | None, s: Settings) -> Prepared | None:
    """Return the prepared launches for x and weight, or None if no kernel supports them. Raises
    TypeError and ValueError as `check`."""
    if weight is None:
        key: Any = (
            x.shape,
            x.dtype,
            x.is_contiguous() or x.stride(),
            x.get_device(),
            x.data_ptr() & 15,
            x.is_neg(),
        )
    else:
        key = (
            x.shape,
            x.dtype,
            x.is_contiguous() or x.stride(),
            x.get_device(),
            x.data_ptr() & 15 | (weight.data_ptr() & 15) << 4,
            x.is_neg(),
            weight.shape,
            weight.dtype,
            weight.is_contiguous(),
            weight.get_device(),
        )
    tracing = torch._C._get_tracing_state() is not None  # torch.jit.trace does not see the launch
    cached: Prepared | None = s.prepared.get(key)
    if cached is not None and not tracing:
        return cached
    check(x, weight, s.offset)
    if tracing or not supported(x, weight):
        return None
    try:
        prepared = Prepared(s, _forward_launch(x, weight, s))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, an old device: Triton raises errors of any type
        _failed.add(x.device)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"rms_norm: the kernel does not compile for {x.device} ({reason}); the plain PyTorch "
            "form runs",
            stacklevel=4,
        )
        return None
    _store(s.prepared, key, prepared)
    return prepared


def forward(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """Compute y of supported tensors, in one launch (none for empty tensors)."""
    prepared = prepare(x, weight, s)
    assert prepared is not None
    return prepared.forward(x, weight)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute (dX, dW) of supported tensors; dW is None if it is not needed."""
    prepared = prepare(x, weight, s)
    assert prepared is not None
    return backward_launch(prepared, dy, x, weight, need_dw)(dy, x, weight)


def backward_launch(
    prepared: Prepared, dy: Tensor, x: Tensor, weight: Tensor | None, need_dw: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return a function of (dy, x, weight) that computes (dX, dW) of these tensors. It has two
    launches, or one if dW is not needed or one CTA computes all of it.

    x and weight may be other tensors than those of the forward: saved-tensor hooks and activation
    checkpointing pass new ones. Raises ValueError if the three do not match.
    """
    if weight is None:
        key: Any = (
            dy.is_contiguous() or dy.stride(),
            x.is_contiguous() or x.stride(),
            x.shape,
            x.dtype,
            x.get_device(),
            dy.data_ptr() & 15 | (x.data_ptr() & 15) << 4,
            dy.is_neg(),
        )
    else:
        key = (
            dy.is_contiguous() or dy.stride(),
            x.is_contiguous() or x.stride(),
            x.shape,
            x.dtype,
            x.get_device(),
            dy.data_ptr() & 15 | (x.data_ptr() & 15) << 4 | (weight.data_ptr() & 15) << 8,
            dy.is_neg(),
            weight.dtype,
            weight.is_contiguous(),
            need_dw,
        )
    launch: Callable[..., tuple[Tensor, Tensor | None]] | None = prepared.backward.get(key)
    if launch is None:
        launch = _backward_launch(dy, x, weight, prepared.s, need_dw)
        _store(prepared.backward, key, launch)
    return launch


def _store(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= MAX_CACHED_SHAPES:
        cache.clear()
    cache[key] = value


def _forward_launch(x: Tensor, weight: Tensor | None, s: Settings) -> Callable[..., Tensor]:
    if x.numel() == 0:
        return lambda x, weight: torch.empty_like(x)
    new_y = Empty.like(x)
    y = new_y()
    layout = row_layout(x.shape, (x.stride(), y.stride()))
    if weight is not None and not weight.is_contiguous():
        return lambda x, weight: forward(x, _contiguous(weight), s)
    if layout is None or x.is_neg():
        return lambda x, weight: _forward_on_copies(x, weight, s)
    from onelaunch.operators.rms_norm import kernels

    plan = _plan(forward_plan, x, s)
    run = bind(
        kernels.forward_chunked_kernel if plan.kernel == "chunked" else kernels.forward_kernel,
        plan.grid,
        (x, y, weight),
        (_rows(x), *_strides(layout), s.eps, s.offset),
        _constants(x, weight, plan, layout, s)
        | {"WEIGHT_FIRST": plan.weight_first, "SEGMENTS": plan.segments},
        plan.warps,
    )

    if weight is not None:
        return sequence(2, [new_y], [(run, (0, 2, 1))], (2,))
    without_weight = sequence(1, [new_y], [(run, (0, 1))], (1,))
    return lambda x, weight: without_weight(x)


def _backward_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    check_gradient(dy, x)
    check(x, weight, s.offset)
    if x.numel() == 0:
        return lambda dy, x, weight: (
            torch.empty_like(x),
            torch.zeros_like(weight) if weight is not None and need_dw else None,
        )
    in_place = s.in_place and _is_overwritable(dy)
    new_dx = Empty.like(x)
    dx = dy if in_place else new_dx()
    layout = row_layout(x.shape, (x.stride(), dy.stride(), dx.stride()))
    if weight is not None and not weight.is_contiguous():
        return lambda dy, x, weight: backward(dy, x, _contiguous(weight), s, need_dw)
    if layout is None or dy.is_neg():
        return lambda dy, x, weight: _backward_on_copies(dy, x, weight, s, need_dw)
    from onelaunch.operators.rms_norm import kernels

    need_dw = need_dw and weight is not None
    plan = _plan(backward_plan, x, s)
    columns = x.shape[-1]
    # One CTA computes all of dW; the chunked kernel accumulates it in memory, so in float32.
    direct = need_dw and plan.grid == 1 and plan.kernel != "chunked"
    partials_like = weight if direct else x.new_empty(0, dtype=torch.float32)
    reduction = reduce_plan(plan.partials, columns) if need_dw and not direct else None
    dependent = reduction is not None and reduction.dependent and dependent_launch(x.device)
    (dy_steps, x_steps, dx_steps) = (layout.strides[1], layout.strides[0], layout.strides[2])
    run = bind(
        kernels.backward_chunked_kernel if plan.kernel == "chunked" else kernels.backward_kernel,
        plan.grid,
        (dy, x, dx, weight, partials_like if need_dw else None),
        (_rows(x), layout.inner, *dy_steps, *x_steps, *dx_steps, s.eps, s.offset),
        _constants(x, weight, plan, layout, s)
        | {"STAGES": plan.stages, "WEIGHT_GRADIENT": need_dw, "DEPENDENT_LAUNCH": dependent},
        plan.warps,
    )
    if reduction is not None:
        add = bind(
            kernels.reduce_kernel,
            reduction.grid,
            (partials_like, weight),
            (plan.partials,),
            {
                "C": columns,
                "BLOCK_PARTIALS": reduction.block_partials,
                "BLOCK_COLUMNS": reduction.block_columns,
                "DEPENDENT_LAUNCH": dependent,
            },
            reduction.warps,
            dependent=dependent,
        )

    # Inputs: dY, x and a weight. Allocated: dX unless it overwrites dY, dW, and its partials.
    n_inputs = 2 if weight is None else 3
    empty = [] if in_place else [new_dx]
    dx_index = 0 if in_place else n_inputs
    if not need_dw:
        tensors = (0, 1, dx_index) if weight is None else (0, 1, dx_index, 2)
        for_dx = sequence(n_inputs, empty, [(run, tensors)], (dx_index,))

        def launch_for_dx(
            dy: Tensor, x: Tensor, weight: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            if in_place:
                _mark_overwritten(dy)
            return (for_dx(dy, x) if weight is None else for_dx(dy, x, weight)), None

        return launch_for_dx
    assert weight is not None
    dw_index = n_inputs + len(empty)
    empty.append(Empty.like(weight))
    if direct:
        steps: list[Step] = [(run, (0, 1, dx_index, 2, dw_index))]
    else:
        partials_index = n_inputs + len(empty)
        empty.append(Empty((plan.partials, columns), (columns, 1), torch.float32, x.device))
        steps = [(run, (0, 1, dx_index, 2, partials_index)), (add, (partials_index, dw_index))]
    both = sequence(n_inputs, empty, steps, (dx_index, dw_index))
    if not in_place:
        return both
    return lambda dy, x, weight: both(_mark_overwritten(dy), x, weight)


def _forward_on_copies(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """Compute y for a layout that the kernels do not support, with the usual strides."""
    dense = torch.empty_like(x)
    if dense.stride(-1) == 1:
        return forward(dense.copy_(x), weight, s)
    return dense.copy_(forward(x.contiguous(), weight, s))


def _backward_on_copies(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the backward on copies. If the layout of x is supported, only dY is copied."""
    like_x = torch.empty_like(x)
    if like_x.stride(-1) == 1:
        if row_layout(x.shape, (x.stride(), like_x.stride())) is None:
            x = torch.empty_like(x).copy_(x)
        return backward(like_x.copy_(dy), x, weight, s, need_dw)
    dx, dw = backward(dy.contiguous(), x.contiguous(), weight, s, need_dw)
    return like_x.copy_(dx), dw


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _is_overwritable(dy: Tensor) -> bool:
    """Return whether no two elements of dy share an address, for certain."""
    return torch._debug_has_internal_overlap(dy) == 0


def _mark_overwritten(dy: Tensor) -> Tensor:
    """Mark dy as modified in place, so that autograd raises if something else has saved it."""
    torch.autograd.graph.increment_version(dy)
    return dy


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _plan(make: Callable[..., Plan], x: Tensor, s: Settings) -> Plan:
    units = multiprocessors(x.device)
    return make(_rows(x), x.shape[-1], x.element_size(), units, s.row_mode, s.rule)


def _strides(layout: RowLayout) -> tuple[int, ...]:
    return (layout.inner, *(step for pair in layout.strides for step in pair))


def _constants(
    x: Tensor, weight: Tensor | None, plan: Plan, layout: RowLayout, s: Settings
) -> dict[str, Any]:
    return {
        "C": x.shape[-1],
        "R": plan.rows_per_tile,
        "BLOCK": plan.block_columns,
        "LAYOUT": layout.kind,
        "HAS_WEIGHT": weight is not None,
        "CASTING": CASTINGS.index(s.casting),
    }
