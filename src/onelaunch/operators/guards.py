"""Compare the metadata of tensors with that of earlier ones, by the guards of torch.compile.

Reading shapes, strides, dtypes, devices and modes one by one costs a host-bound operator 1.5 us per
call; `TensorGuards` compares them all in 0.15 us. It is not a public interface: if it is missing or
has changed, there is no guard and callers take the slow path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None  # type: ignore[no-redef]

Guard = Callable[..., bool]
Kind = TypeVar("Kind")
Value = TypeVar("Value")
# Cached values with the guards of their tensors, the newest first.
Recent: TypeAlias = tuple[tuple[Guard, Kind, Value], ...]

MAX_RECENT = 4  # a model's norms have a few shapes; a guard that fails costs 0.15 us


def make_guard(*tensors: Tensor) -> Guard | None:
    """Make a function of as many tensors that returns whether each has the same type, dtype,
    device, sizes, strides, dispatch keys and requires_grad as these, with the same autocast,
    inference mode and functorch transforms as now.

    It does not see every dispatch mode, keeps no reference to the tensors, and does not compare
    addresses. Returns None if this PyTorch has no such guards.
    """
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    try:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        guard: Guard = guards.check
        return guard if guard(*tensors) else None
    except Exception:
        return None


def add_recent(
    recent: Recent[Kind, Value], tensors: tuple[Tensor, ...], kind: Kind, value: Value
) -> Recent[Kind, Value]:
    """Return `recent` with the value of these tensors in front, if a guard can be made for them."""
    guard = make_guard(*tensors)
    return recent if guard is None else ((guard, kind, value), *recent[: MAX_RECENT - 1])
