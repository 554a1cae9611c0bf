"""The memory layout of the rows of several tensors, as the kernels address them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTIGUOUS, STRIDED, NESTED = 0, 1, 2


@dataclass(frozen=True)
class RowLayout:
    """Offsets of rows. Row i of tensor t starts at element i * columns if `kind` is CONTIGUOUS, at
    i * strides[t][0] if STRIDED, else at
    (i // inner) * strides[t][0] + (i % inner) * strides[t][1]."""

    kind: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def row_layout(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> RowLayout | None:
    """Return the common layout of tensors of one shape (..., C), from their strides in elements;
    None if two strides cannot express it. All must have unit stride along C.

    The order of rows is free, so the leading axes are sorted by the strides of the first tensor,
    longest first: transposed heads then have the same layout as contiguous ones.
    """
    columns = shape[-1]
    if columns > 1 and any(s[-1] != 1 for s in strides):
        return None
    axes = [i for i, size in enumerate(shape[:-1]) if size > 1]
    axes.sort(key=lambda i: -strides[0][i])
    sizes: list[int] = []
    steps: list[list[int]] = []  # per merged axis, one stride per tensor
    for axis in axes:
        size, step = shape[axis], [s[axis] for s in strides]
        if sizes and all(outer == size * s for outer, s in zip(steps[-1], step, strict=True)):
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 2:
        return None
    if len(sizes) == 2:
        outer, inner = steps
        if sizes[0] * sizes[1] >= 2**31:
            return None  # the kernels divide 32-bit row numbers
        return RowLayout(NESTED, sizes[1], tuple(zip(outer, inner, strict=True)))
    if not sizes or all(step == columns for step in steps[0]):
        return RowLayout(CONTIGUOUS, 1, ((0, 0),) * len(strides))
    return RowLayout(STRIDED, 1, tuple((step, 0) for step in steps[0]))
