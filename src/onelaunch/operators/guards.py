"""Whether tensors are as others were, said by one call.

Reading shapes, strides, dtypes, devices and modes one after another costs a host-bound operator
1.5 us a call; torch.compile's own guard compares them all in 0.15. It is not a public interface:
where it is not as it was, there is no guard, and the slow way is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None  # type: ignore[no-redef]

Same = Callable[..., bool]
Kind = TypeVar("Kind")
Value = TypeVar("Value")
# What was found for the tensors that a guard knows, the latest first.
Recent: TypeAlias = tuple[tuple[Same, Kind, Value], ...]

MOST_RECENT = 4  # a model's norms have a few shapes; a guard that does not fit costs 0.15 us


def same_as(*tensors: Tensor) -> Same | None:
    """A function of as many tensors: whether each has the type, dtype, device, sizes, strides,
    dispatch keys and requires_grad that its predecessor here has, and autocast, inference mode and
    functorch's transforms are as they are now. It does not see every dispatch mode, keeps none of
    the tensors, and says nothing of addresses. None where this PyTorch cannot say."""
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    try:
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        same: Same = guards.check
        return same if same(*tensors) else None
    except Exception:
        return None


def with_recent(
    recent: Recent[Kind, Value], tensors: tuple[Tensor, ...], kind: Kind, value: Value
) -> Recent[Kind, Value]:
    """`recent` with the value of these tensors before it, as far as there is a guard for them."""
    same = same_as(*tensors)
    return recent if same is None else ((same, kind, value), *recent[: MOST_RECENT - 1])
