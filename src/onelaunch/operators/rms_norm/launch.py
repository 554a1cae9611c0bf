"""Runs the kernels on tensors.

What a shape needs is worked out once: the plan, the layout of its rows, the compiled kernels. Every
later call looks it up by shape, dtype, strides and alignment and launches.
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
# Triton decides while it is imported; kernels then run on a CPU's tensors too, slowly.
_TRUE = ("1", "true", "yes", "on", "y")
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE
_failed: set[torch.device] = set()  # where a kernel did not compile
# So many shapes are remembered; sequences of every length would otherwise fill the memory.
MAX_REMEMBERED = 4096


@dataclass(eq=False)
class Settings:
    """What a call fixes besides its tensors, checked, and what was worked out for it by shape."""

    eps: float
    casting: str
    offset: float
    in_place: bool
    row_mode: str
    rule: str
    prepared: dict[Any, Prepared] = field(default_factory=dict, repr=False)
    # Of x and a weight, the latest first, and whether a gradient can be asked of them.
    recent: Recent[bool, Prepared] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("casting", self.casting, CASTINGS),
            ("row_mode", self.row_mode, ROW_MODES),
            ("rule", self.rule, RULES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        for name, number in (("eps", self.eps), ("offset", self.offset)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a number, not {number!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be 0 or more, not {self.eps}")

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.eps, self.casting, self.offset, self.in_place, self.row_mode, self.rule)
        return settings, values  # copies and pickles leave the remembered kernels behind


def settings(
    eps: float, casting: str, offset: float, in_place: bool, row_mode: str, rule: str
) -> Settings:
    """The settings of these values; raises ValueError or TypeError naming the wrong one."""
    key = (eps, casting, offset, in_place, row_mode, rule)
    found = _settings.get(key)
    if found is None:
        found = Settings(*key)
        _remember(_settings, key, found)
    return found


_settings: dict[tuple[object, ...], Settings] = {}


def check(x: Tensor, weight: Tensor | None, offset: float) -> None:
    """Raise TypeError or ValueError, in words, where the operator is not defined."""
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
            raise ValueError("rms_norm: an offset is added to a weight, and there is none")
        return
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, x rows of {x.shape[-1]} elements"
        )
    if weight.device != x.device:
        raise ValueError(f"rms_norm: x is on {x.device}, weight on {weight.device}")


def available(device: torch.device) -> bool:
    """Whether there is a kernel for a device: Triton is installed, and the device is a GPU of
    NVIDIA, AMD or Intel, or Triton interprets."""
    if device.type == "cpu":
        return INTERPRETED
    return device.type in ("cuda", "xpu") and HAS_TRITON


def supported(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels compute these tensors; the plain form computes all others."""
    if not available(x.device) or x.device in _failed:
        return False
    if x.dtype not in DTYPES or x.shape[-1] > MAX_COLUMNS:
        return False
    return weight is None or weight.dtype in DTYPES


def check_gradient(dy: Tensor, x: Tensor) -> None:
    """Raise ValueError unless dy can be the gradient of y."""
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"rms_norm: the gradient is {_said_of(dy)}, x is {_said_of(x)}: they must agree"
        )


class Prepared:
    """What one shape, dtype and layout of x and weight need: `forward(x, weight)` launches, and
    `backward` remembers what the gradients' layouts need. `recent_backward` is of dY, x and a
    weight, the latest first, and whether dW is needed."""

    __slots__ = ("backward", "forward", "recent_backward", "s")

    def __init__(self, s: Settings, forward: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.s = s
        self.forward = forward
        self.backward: dict[Any, Any] = {}
        self.recent_backward: Recent[bool, Callable[..., tuple[Tensor, Tensor | None]]] = ()


def prepare(x: Tensor, weight: Tensor | None, s: Settings) -> Prepared | None:
    """What x and weight need, or None where there is no kernel for them; raises TypeError and
    ValueError where they do not fit together."""
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
    tracing = torch._C._get_tracing_state() is not None  # a trace would not see the launch
    found: Prepared | None = s.prepared.get(key)
    if found is not None and not tracing:
        return found
    check(x, weight, s.offset)
    if tracing or not supported(x, weight):
        return None
    try:
        prepared = Prepared(s, _forward_launch(x, weight, s))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, an old device: whatever Triton raises
        _failed.add(x.device)
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"rms_norm: its kernel does not compile for {x.device} ({why}); the plain PyTorch form "
            "runs",
            stacklevel=4,
        )
        return None
    _remember(s.prepared, key, prepared)
    return prepared


def forward(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """y of tensors that `supported` lets pass. One launch, none for no rows."""
    prepared = prepare(x, weight, s)
    assert prepared is not None
    return prepared.forward(x, weight)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """(dX, dW) of tensors that `supported` lets pass; dW is None where it is not needed."""
    prepared = prepare(x, weight, s)
    assert prepared is not None
    return backward_launch(prepared, dy, x, weight, need_dw)(dy, x, weight)


def backward_launch(
    prepared: Prepared, dy: Tensor, x: Tensor, weight: Tensor | None, need_dw: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`backward` of these tensors where the forward's preparation is at hand, to be called with
    them. Two launches, one where no dW is needed or one program holds it all.

    x and weight may be other tensors than the forward's: hooks on saved tensors and checkpointing
    bring their own. Raises ValueError where the three do not fit together.
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
        _remember(prepared.backward, key, launch)
    return launch


def _remember(store: dict[Any, Any], key: Any, value: Any) -> None:
    if len(store) >= MAX_REMEMBERED:
        store.clear()
    store[key] = value


def _forward_launch(x: Tensor, weight: Tensor | None, s: Settings) -> Callable[..., Tensor]:
    if x.numel() == 0:
        return lambda x, weight: torch.empty_like(x)
    new_y = Empty.like(x)
    y = new_y()
    layout = row_layout(x.shape, (x.stride(), y.stride()))
    if weight is not None and not weight.is_contiguous():
        return lambda x, weight: forward(x, _compact(weight), s)
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
        | {"WEIGHT_FIRST": plan.weight_first, "PARTS": plan.parts},
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
    in_place = s.in_place and _can_be_written_over(dy)
    new_dx = Empty.like(x)
    dx = dy if in_place else new_dx()
    layout = row_layout(x.shape, (x.stride(), dy.stride(), dx.stride()))
    if weight is not None and not weight.is_contiguous():
        return lambda dy, x, weight: backward(dy, x, _compact(weight), s, need_dw)
    if layout is None or dy.is_neg():
        return lambda dy, x, weight: _backward_on_copies(dy, x, weight, s, need_dw)
    from onelaunch.operators.rms_norm import kernels

    need_dw = need_dw and weight is not None
    plan = _plan(backward_plan, x, s)
    columns = x.shape[-1]
    # One program holds all of dW; the chunked kernel adds it up in memory, so in float32.
    direct = need_dw and plan.grid == 1 and plan.kernel != "chunked"
    partials_of = weight if direct else x.new_empty(0, dtype=torch.float32)
    adding = reduce_plan(plan.partials, columns) if need_dw and not direct else None
    dependent = adding is not None and adding.dependent and dependent_launch(x.device)
    (dy_steps, x_steps, dx_steps) = (layout.strides[1], layout.strides[0], layout.strides[2])
    run = bind(
        kernels.backward_chunked_kernel if plan.kernel == "chunked" else kernels.backward_kernel,
        plan.grid,
        (dy, x, dx, weight, partials_of if need_dw else None),
        (_rows(x), layout.inner, *dy_steps, *x_steps, *dx_steps, s.eps, s.offset),
        _constants(x, weight, plan, layout, s)
        | {"STAGES": plan.stages, "WEIGHT_GRADIENT": need_dw, "DEPENDENT_LAUNCH": dependent},
        plan.warps,
    )
    if adding is not None:
        add = bind(
            kernels.reduce_kernel,
            adding.grid,
            (partials_of, weight),
            (plan.partials,),
            {
                "C": columns,
                "BLOCK_PARTIALS": adding.block_partials,
                "BLOCK_COLUMNS": adding.block_columns,
                "DEPENDENT_LAUNCH": dependent,
            },
            adding.warps,
            dependent=dependent,
        )

    # dY, x and a weight are given; dX where it does not lie over dY, dW and its partials are made.
    given = 2 if weight is None else 3
    made = [] if in_place else [new_dx]
    dx_at = 0 if in_place else given
    if not need_dw:
        tensors = (0, 1, dx_at) if weight is None else (0, 1, dx_at, 2)
        for_dx = sequence(given, made, [(run, tensors)], (dx_at,))

        def launch_for_dx(
            dy: Tensor, x: Tensor, weight: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            if in_place:
                _written_over(dy)
            return (for_dx(dy, x) if weight is None else for_dx(dy, x, weight)), None

        return launch_for_dx
    assert weight is not None
    dw_at = given + len(made)
    made.append(Empty.like(weight))
    if direct:
        steps: list[Step] = [(run, (0, 1, dx_at, 2, dw_at))]
    else:
        partials_at = given + len(made)
        made.append(Empty((plan.partials, columns), (columns, 1), torch.float32, x.device))
        steps = [(run, (0, 1, dx_at, 2, partials_at)), (add, (partials_at, dw_at))]
    both = sequence(given, made, steps, (dx_at, dw_at))
    if not in_place:
        return both
    return lambda dy, x, weight: both(_written_over(dy), x, weight)


def _forward_on_copies(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """y of a layout that the kernels do not walk, with the strides that it always has."""
    dense = torch.empty_like(x)
    if dense.stride(-1) == 1:
        return forward(dense.copy_(x), weight, s)
    return dense.copy_(forward(x.contiguous(), weight, s))


def _backward_on_copies(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    """The same of the backward. Where x can be walked only dY is copied, to lie as x does."""
    like_x = torch.empty_like(x)
    if like_x.stride(-1) == 1:
        if row_layout(x.shape, (x.stride(), like_x.stride())) is None:
            x = torch.empty_like(x).copy_(x)
        return backward(like_x.copy_(dy), x, weight, s, need_dw)
    dx, dw = backward(dy.contiguous(), x.contiguous(), weight, s, need_dw)
    return like_x.copy_(dx), dw


def _compact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _can_be_written_over(dy: Tensor) -> bool:
    """Whether no two of its elements share an address, for certain."""
    return torch._debug_has_internal_overlap(dy) == 0


def _written_over(dy: Tensor) -> Tensor:
    """dy, and autograd told that it changes: where something else has saved it, it will say so."""
    torch.autograd.graph.increment_version(dy)
    return dy


def _said_of(tensor: Tensor) -> str:
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
