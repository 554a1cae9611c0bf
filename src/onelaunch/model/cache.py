"""Keys and values of earlier positions, and which of them a position sees.

Shapes: B batch, S sequence, T cached positions, K kv heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from onelaunch.config import ModelConfig


def causal_mask(S: int, past: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of T = past + S positions each of the last S sees, (S, T): those up to itself, and of
    these the last `window`. None where that is all of them, or plainly those up to itself."""
    T = past + S
    if window is not None and window >= T:
        window = None
    if window is None and (S == 1 or not past):
        return None
    mask_ST = torch.ones(S, T, dtype=torch.bool, device=device).tril(past)
    return mask_ST if window is None else mask_ST.triu(past + 1 - window)


class KVCache:
    """Keys and values of the positions seen so far, for every layer.

    `keys` and `values` are lists of (B, K, capacity, E); `length` positions are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.length = 0

    def row(self, row: int, length: int) -> KVCache:
        """One sequence's cache over the same memory, of which `length` positions are filled."""
        one = copy(self)
        one.keys = [keys[row : row + 1] for keys in self.keys]
        one.values = [values[row : row + 1] for values in self.values]
        one.length = length
        return one

    def extend(self, layer: int, k_BKSE: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions to one layer; returns that layer's (B, K, T+S, E) keys and values."""
        end = self.length + k_BKSE.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = k_BKSE
        values[:, :, self.length : end] = v_BKSE
        return keys[:, :, :end], values[:, :, :end]

    def rope(self, cos_SE: Tensor, sin_SE: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """The rotary tables of the next S positions."""
        end = self.length + S
        return cos_SE[self.length : end], sin_SE[self.length : end]

    def mask(self, S: int, device: torch.device, window: int | None = None) -> Tensor | None:
        """Which positions the next S may see, where that is neither all nor those before each."""
        return causal_mask(S, self.length, window, device)


class RaggedCache:
    """The first rows of a cache, filled to different lengths, for one more token of each.

    `lengths` has a number for each row; they are not changed.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int]) -> None:
        device = cache.keys[0].device
        self.keys, self.values = cache.keys, cache.values
        self.length = max(lengths)
        self._positions_B = torch.tensor(lengths, device=device)
        self._rows_B = torch.arange(len(lengths), device=device)
        distances = self._positions_B[:, None, None, None]
        self._distances_B11T = distances - torch.arange(self.length + 1, device=device)

    def extend(self, layer: int, k_BK1E: Tensor, v_BK1E: Tensor) -> tuple[Tensor, Tensor]:
        """Put a position into each row of one layer; returns keys and values, (B, K, T, E), as
        many positions as the longest row has."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows_B, :, self._positions_B] = k_BK1E[:, :, 0].to(keys.dtype)
        values[self._rows_B, :, self._positions_B] = v_BK1E[:, :, 0].to(values.dtype)
        rows, T = len(k_BK1E), self.length + 1
        return keys[:rows, :, :T], values[:rows, :, :T]

    def rope(self, cos_SE: Tensor, sin_SE: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """The rotary tables at each row's next position, (B, 1, 1, E)."""
        positions_B11 = self._positions_B[:, None, None]
        return cos_SE[positions_B11], sin_SE[positions_B11]

    def mask(self, S: int, device: torch.device, window: int | None = None) -> Tensor:
        """Which positions each row's token may see, (B, 1, 1, T)."""
        seen = self._distances_B11T >= 0
        return seen if window is None else seen & (self._distances_B11T < window)


Cache = KVCache | RaggedCache
