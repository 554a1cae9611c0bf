"""How the rows of several tensors lie in memory, as a kernel can walk them: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTIGUOUS, STRIDED, NESTED = 0, 1, 2


@dataclass(frozen=True)
class RowLayout:
    """Row i of tensor t begins at (i // inner) * strides[t][0] + (i % inner) * strides[t][1];
    where `kind` is STRIDED at i * strides[t][0], where CONTIGUOUS at i * columns."""

    kind: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def row_layout(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> RowLayout | None:
    """The common layout of tensors of one shape (..., C), their strides in elements, or None where
    two strides do not say it. All must have unit stride along C.

    The order of the rows is free, so the leading axes are taken by the first tensor's strides,
    longest first: transposed heads are then as good as contiguous ones.
    """
    columns = shape[-1]
    if columns > 1 and any(s[-1] != 1 for s in strides):
        return None
    axes = [i for i, size in enumerate(shape[:-1]) if size > 1]
    axes.sort(key=lambda i: -strides[0][i])
    sizes: list[int] = []
    steps: list[list[int]] = []  # per kept axis, one stride for each tensor
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
