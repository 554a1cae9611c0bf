"""Tables of int64 fields that Python and the compiled program share; `layout` names the fields."""

from __future__ import annotations

import ctypes
import struct


class Table:
    """int64 fields in memory that the program reads and writes."""

    def __init__(self, length: int) -> None:
        self._fields = (ctypes.c_int64 * (length + 16))()
        # whole cache lines, as words between threads need them
        start = ctypes.addressof(self._fields)
        self._skip = (-start % 128) // 8
        self.address = start + 8 * self._skip

    def __getitem__(self, index: int) -> int:
        return self._fields[self._skip + index]

    def __setitem__(self, index: int, value: int) -> None:
        self._fields[self._skip + index] = value

    def set_float(self, index: int, value: float) -> None:
        """A float32 in a field's low half."""
        self[index] = struct.unpack("<i", struct.pack("<f", value))[0]
