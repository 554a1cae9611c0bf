"""Rotary position embedding: frequencies, their scalings, tables, and the rotation.

Shapes: B batch, S positions, H heads, E head width, P = E/2 pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onelaunch.config import LinearRopeScaling, ModelConfig, RopeScaling, YarnRopeScaling


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each of the E/2 pairs: theta^(-2i/E) (Su et al., 2104.09864),
    changed by `config.rope_scaling`."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    match config.rope_scaling:
        case RopeScaling() as scaling:
            return _llama3_scaled(frequencies, scaling)
        case LinearRopeScaling() as scaling:
            return frequencies / scaling.factor
        case YarnRopeScaling() as scaling:
            return _yarn_scaled(frequencies, scaling, config)
    return frequencies


def _llama3_scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, the ones between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    slowed = torch.where(turns < low, frequencies / scaling.factor, blended)
    return torch.where(turns > high, frequencies, slowed)


def _yarn_scaled(frequencies: Tensor, scaling: YarnRopeScaling, config: ModelConfig) -> Tensor:
    """A linear ramp over the pairs, from those that keep their frequency to those that are slowed
    by `factor` (Peng et al., 2309.00071, section 3.2)."""

    def pair(turns: float) -> float:
        """The pair, with a fraction, that turns so often within the original context."""
        wavelength = scaling.original_max_seq_len / turns
        return E * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    E = config.head_dim
    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), E - 1)
    slowed = ((torch.arange(E // 2).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * slowed + frequencies * (1 - slowed)


def rope_tables(config: ModelConfig, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (positions, E/2) in float32; YaRN's are multiplied by its
    `attention_factor`."""
    positions = torch.arange(length or config.max_seq_len).float()
    angles = torch.outer(positions, rope_frequencies(config))
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return torch.cos(angles), torch.sin(angles)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return torch.cos(angles) * factor, torch.sin(angles) * factor


def widen_rope(cos_SP: Tensor, sin_SP: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The tables for whole heads, (S, E); the sine of a pair's first element is negated."""
    pair_axis = -1 if interleaved else -2
    cos_SE = torch.stack((cos_SP, cos_SP), dim=pair_axis).flatten(-2)
    return cos_SE, torch.stack((-sin_SP, sin_SP), dim=pair_axis).flatten(-2)


def apply_rope(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of each head: x cos + (the pair's other element) sin.

    Written over whole heads, as half as many operations as over the two elements of each pair.
    """
    if interleaved:
        other = x_BHSE.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = torch.cat(x_BHSE.chunk(2, dim=-1)[::-1], dim=-1)
    return torch.addcmul(x_BHSE * cos_SE, other, sin_SE)
