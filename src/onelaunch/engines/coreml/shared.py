"""Memory that a process and its child share: room for the inputs and outputs of a program.

Its name is gone as soon as both have it: whatever kills either of them then, nothing is left.
"""

from __future__ import annotations

import math
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from onelaunch.engines.coreml.backend import HANDED, Interface

ALIGNMENT = 128
"""Bytes of a cache line of Apple's processors."""
WIDEST = 8
"""Bytes of a number that is handed in: inputs come in whatever type the caller has."""


class Shared:
    """The arrays of an interface. None of them may be used after `close`."""

    def __init__(self, interface: Interface, memory: SharedMemory) -> None:
        self._interface, self._memory = interface, memory
        self._inputs, self._outputs, _ = _places(interface)
        self._named = True

    @classmethod
    def new(cls, interface: Interface) -> Shared:
        """Allocate, in the parent."""
        return cls(interface, SharedMemory(create=True, size=_places(interface)[2]))

    @classmethod
    def attach(cls, interface: Interface, name: str) -> Shared:
        """Attach, in the child."""
        return cls(interface, _untracked(name))

    @property
    def name(self) -> str:
        return self._memory.name

    def input(self, name: str, dtype: str) -> np.ndarray:
        shape = self._interface.inputs[name].shape
        return np.ndarray(shape, dtype, self._memory.buf, self._inputs[name])

    def output(self, name: str) -> np.ndarray:
        each = self._interface.outputs[name]
        return np.ndarray(each.shape, HANDED[each.dtype], self._memory.buf, self._outputs[name])

    def forget_name(self) -> None:
        """Forget the name, in the parent, as soon as the child has attached."""
        if self._named:
            self._named = False
            self._memory.unlink()

    def close(self) -> None:
        self._memory.close()


def _places(interface: Interface) -> tuple[dict[str, int], dict[str, int], int]:
    """The offset of each input and output, and the bytes of all."""
    places: tuple[dict[str, int], dict[str, int]] = ({}, {})
    end = 0
    for offsets, types in zip(places, (interface.inputs, interface.outputs), strict=True):
        for name, each in types.items():
            offsets[name] = end
            n_bytes = WIDEST * math.prod(each.shape)
            end += -(-n_bytes // ALIGNMENT) * ALIGNMENT
    return *places, end


def _untracked(name: str) -> SharedMemory:
    """Memory that is another process's to delete: before Python 3.13 who only opens it is taken for
    its owner, and it is deleted, with a warning, where that process ends."""
    if sys.version_info >= (3, 13):
        return SharedMemory(name, track=False)
    before = resource_tracker.register
    resource_tracker.register = lambda *_: None  # type: ignore[assignment]
    try:
        return SharedMemory(name)
    finally:
        resource_tracker.register = before
