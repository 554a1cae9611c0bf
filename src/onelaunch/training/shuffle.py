"""Stateless random numbers in integer arithmetic, the same on every machine and version.

`mix64` is a hash of a number; `shuffled` is a keyed permutation of any range, computed element by
element, so that shuffling a billion windows needs no memory.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = 6


def mix64(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def _mix64(values_N: np.ndarray) -> np.ndarray:
    """`mix64` of each element, in uint64 (which wraps around)."""
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return values_N ^ (values_N >> np.uint64(31))


def shuffled(positions_N: np.ndarray, n: int, key: int) -> np.ndarray:
    """Apply the permutation of range(n) with this `key` to positions; int64.

    A Feistel network on the next power of two; values of n or above are permuted again until they
    are below (cycle walking; Black and Rogaway 2002), at most twice on average.
    """
    result_N = _feistel(positions_N.astype(np.uint64), n, key)
    while (outside_N := result_N >= n).any():
        result_N[outside_N] = _feistel(result_N[outside_N], n, key)
    return result_N.astype(np.int64)


def _feistel(values_N: np.ndarray, n: int, key: int) -> np.ndarray:
    bits = max(2, (n - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    low_N = values_N & np.uint64((1 << low_bits) - 1)
    high_N = values_N >> np.uint64(low_bits)
    for step in range(_ROUNDS):
        # the halves, and their widths, swap in each round
        mask = np.uint64((1 << high_bits) - 1)
        round_key = np.uint64(mix64(key + step))
        low_N, high_N = high_N ^ (_mix64(low_N ^ round_key) & mask), low_N
        low_bits, high_bits = high_bits, low_bits
    return (high_N << np.uint64(low_bits)) | low_N
