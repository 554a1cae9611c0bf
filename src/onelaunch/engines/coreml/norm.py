"""RMSNorm in float16 without overflow: x / sqrt(mean(x^2) + eps) over some axis.

The square of a float16 number is infinite from 256 on and 0 below 2^-12. So x is first multiplied
by s, a power of two for each row, which is exact:

    s = 2^ceil(-log2(max|x| + floor)),   r = 1 / sqrt(mean((s x)^2) + s^2 eps),   y = s x r

The largest of s x is in [1, 2) or, for rows below `floor`, less. `floor` is the smallest power of
two not below sqrt(eps), and at least float16's smallest normal number: it bounds s, and below it
eps decides. Where the form without s neither overflows nor underflows, y has the same bits.
A device's logarithm and power are approximations: if s is a binade off, or no power of two, y stays
right, as the same s is in all three places, and at worst is rounded once more.

All operations have a form on the Neural Engine (ANEForge, its page op-catalog). A reduction may add
up in float16 there (ANEForge, numerics): the sum of squares is below 4 times the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Var = Any
"""A value of coremltools' own representation (MIL)."""

_SMALLEST_NORMAL = 14
"""The exponent, negated, of float16's smallest normal number; that of its smallest one is -24."""
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Normalized:
    """The output of a norm before its weight, and the two factors that make it of x."""

    parts: list[Var]
    scale: Var
    inverse: Var
    """Of the scaled x: 1 / sqrt(mean(x^2) + eps) is `scale` times this, which float16 need not
    hold."""


def floor_exponent(eps: float) -> int:
    """k of `floor` = 2^-k."""
    return min(_SMALLEST_NORMAL, max(0, math.floor(-0.5 * math.log2(eps))))


def scaled_eps(eps: float) -> np.float16:
    """eps / floor^2, what a program has of eps; where that is 0 in float16, the smallest number, so
    that a row of zeros stays one."""
    return np.float16(max(_SMALLEST, eps * 4.0 ** floor_exponent(eps)))


def stated_eps(eps: float) -> float:
    """eps as a program has it."""
    return float(scaled_eps(eps)) / 4.0 ** floor_exponent(eps)


def normalize(
    mb: Any, eps: float, parts: Sequence[Var], axis: int, divisor: float = 1.0
) -> Normalized:
    """x / sqrt(mean(x^2) + eps) of rows along `axis`, each cut in parts of equal shape; see
    `mean_of_parts` for `divisor`."""
    floor = 2.0 ** -floor_exponent(eps)
    magnitude = mb.abs(x=parts[0])
    for part in parts[1:]:
        magnitude = mb.maximum(x=magnitude, y=mb.abs(x=part))
    largest = mb.reduce_max(x=magnitude, axes=[axis], keep_dims=True)
    logarithm = mb.log(x=largest, epsilon=np.float16(floor))
    exponent = mb.ceil(x=mb.mul(x=logarithm, y=np.float16(-1 / math.log(2))))
    scale = mb.exp2(x=exponent)
    scaled = [mb.mul(x=part, y=scale) for part in parts]
    mean = mean_of_parts(mb, [mb.mul(x=part, y=part) for part in scaled], axis, divisor)
    # s^2 alone passes float16's range, and eps may be below it
    by_floor = mb.mul(x=scale, y=np.float16(floor))
    eps_there = mb.mul(x=mb.mul(x=by_floor, y=by_floor), y=scaled_eps(eps))
    inverse = mb.rsqrt(x=mb.add(x=mean, y=eps_there), epsilon=np.float16(0))
    return Normalized([mb.mul(x=part, y=inverse) for part in scaled], scale, inverse)


def normalize_backward(
    mb: Any, norm: Normalized, gradients: Sequence[Var], axis: int, divisor: float = 1.0
) -> list[Var]:
    """The gradient of x from that of the normalized x: (g - xhat mean(g xhat)) / rms(x)."""
    pairs = list(zip(gradients, norm.parts, strict=True))
    mean = mean_of_parts(mb, [mb.mul(x=g, y=part) for g, part in pairs], axis, divisor)
    d_parts = []
    for g, part in pairs:
        difference = mb.sub(x=g, y=mb.mul(x=part, y=mean))
        d_parts.append(mb.mul(x=mb.mul(x=difference, y=norm.inverse), y=norm.scale))
    return d_parts


def mean_of_parts(mb: Any, parts: Sequence[Var], axis: int, divisor: float = 1.0) -> Var:
    """The sum of the parts' means along `axis`, divided by `divisor`: elements of a row over those
    of a part, padding included. By a division: 24 / 16 is a float16 number, 16 / 24 is none."""
    total = None
    for part in parts:
        mean = mb.reduce_mean(x=part, axes=[axis], keep_dims=True)
        total = mean if total is None else mb.add(x=total, y=mean)
    return total if divisor == 1.0 else mb.real_div(x=total, y=np.float16(divisor))
