"""Parse the header of a GGUF file: its metadata and its table of tensors, without the tensors.

Little-endian: "GGUF", uint32 version, uint64 counts of tensors and of metadata; then metadata (key,
type, value), tensors (name, dimensions from the innermost on, type, offset), padding, and the data.
The package gguf reads this too, but makes several arrays of each array's element (a vocabulary
takes seconds), checks no bounds, and lets errors of numpy out.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.checkpoints.lfs import refuse_pointer
from onelaunch.errors import BadInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Llama 3's header has 8 MB and an array of 280,147 merges. Arrays cost memory: a tokenizer of as
# many merges takes 220 MB while it is made.
MAX_HEADER_BYTES = 32 << 20
MAX_ARRAY = 3 << 17
MAX_ENTRIES = 1 << 16
_MAX_DIMENSIONS = 4
_LONGEST_REASON = 400
_MAX_ALIGNMENT = 1 << 16

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


def begins_as_gguf(path: Path) -> bool:
    """Return whether a file can be read and begins with the magic of GGUF."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class TensorType:
    """How a tensor is stored: blocks of `block` elements in `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    8: TensorType("Q8_0", 32, 34),
    14: TensorType("Q6_K", 256, 210),  # of embeddings in llama.cpp's Q4_0 files
    30: TensorType("BF16", 1, 2),
}
"""The types that are read, by their numbers."""
_OTHER_TYPES = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
_OTHER_TYPES |= {15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 28: "F64", 39: "MXFP4"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is: `start` counts from the beginning of the file, `shape` is row-major."""

    type: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) // self.type.block * self.type.block_bytes


@dataclass(frozen=True, slots=True)
class _Array:
    kind: int
    count: int
    start: int


class Header:
    """The header of one file; arrays are decoded when they are asked for.

    A getter returns None for an absent key, and raises BadInput for a value of another type.
    `data` is the whole file, memory-mapped; writing to it does not change the file.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises BadInput naming the file if it cannot be read, is not GGUF, or is damaged."""
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                beginning = file.read(24)
                refuse_pointer(path, beginning)
                if len(beginning) < 24:
                    raise self.error(f"{size} bytes are too few for a GGUF file")
                self.data = np.memmap(file, dtype=np.uint8, mode="c")
        except OSError as error:
            raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
        self._check_version(beginning)
        n_tensors, n_entries = struct.unpack_from("<QQ", beginning, 8)
        if max(n_tensors, n_entries) > MAX_ENTRIES:
            raise self.error(
                f"it claims {n_tensors} tensors and {n_entries} metadata; damaged, or not a model"
            )
        self._buffer = memoryview(self.data)  # type: ignore[arg-type]
        self._end = min(size, MAX_HEADER_BYTES)
        self._place = len(beginning)
        self._values: dict[str, Any] = {}
        for _ in range(n_entries):
            key = self._string()
            if key in self._values:
                raise self.error(f"the key {key!r} occurs twice")
            self._values[key] = self._value(self._number("I"))
        self.tensors = self._tensor_table(n_tensors, size)

    def error(self, reason: str) -> BadInput:
        """Make a BadInput that names the file; a name in it may have megabytes."""
        return BadInput(f"{self.path}: {reason[:_LONGEST_REASON]}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str) -> str | None:
        """Return a string."""
        return self._scalar(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """Return an integer."""
        return self._scalar(key, int, "an integer")

    def flag(self, key: str) -> bool | None:
        """Return a boolean."""
        return self._scalar(key, bool, "true or false")

    def real(self, key: str) -> float | None:
        """Return a number; one that is stored as float32 as the shortest decimal that rounds to
        it: 1e-05, not 9.999999747378752e-06."""
        value = self._scalar(key, (float, np.float32), "a number")
        return None if value is None else float(str(value))

    def number(self, key: str) -> float | None:
        """Return an integer or a number."""
        return self._scalar(key, (int, float, np.float32), "a number")

    def strings(self, key: str) -> list[bytes] | None:
        """Return an array of strings, as bytes: pieces of a vocabulary may not be UTF-8."""
        array = self._array(key, (_STRING,), "strings")
        if array is None:
            return None
        place, strings = array.start, []
        for _ in range(array.count):
            (length,) = struct.unpack_from("<Q", self._buffer, place)
            strings.append(bytes(self._buffer[place + 8 : place + 8 + length]))
            place += 8 + length
        return strings

    def numbers(self, key: str) -> list[Any] | None:
        """Return an array of integers or of floats."""
        array = self._array(key, tuple(_SCALARS), "numbers")
        if array is None:
            return None
        form = f"<{array.count}{_SCALARS[array.kind]}"
        return list(struct.unpack_from(form, self._buffer, array.start))

    def is_array(self, key: str) -> bool:
        """Return whether the value of a key is an array."""
        return isinstance(self._values.get(key), _Array)

    def _scalar(self, key: str, kind: Any, name: str) -> Any:
        value = self._values.get(key)
        wrong = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong or not isinstance(value, kind)):
            raise self.error(f"{key} must be {name}")
        return value

    def _array(self, key: str, kinds: tuple[int, ...], name: str) -> _Array | None:
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, _Array) or value.kind not in kinds:
            raise self.error(f"{key} must be an array of {name}")
        return value

    def _check_version(self, beginning: bytes) -> None:
        if beginning[:4] != MAGIC:
            raise self.error("not a GGUF file; download or export it again")
        (version,) = struct.unpack_from("<I", beginning, 4)
        if version not in VERSIONS:
            swapped = int.from_bytes(beginning[4:8], "big")
            kind = "big-endian GGUF" if swapped in VERSIONS else f"GGUF version {version}"
            raise self.error(f"{kind} is not supported; convert the model again")

    def _take(self, n: int) -> int:
        """Return the place of the next `n` bytes."""
        start = self._place
        if n > self._end - start:
            if self._end == MAX_HEADER_BYTES:
                raise self.error(f"its header has more than {MAX_HEADER_BYTES} bytes")
            raise self.error("truncated or damaged: the file ends within its header")
        self._place += n
        return start

    def _number(self, form: str) -> Any:
        form = f"<{form}"
        return struct.unpack_from(form, self._buffer, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        length = self._number("Q")
        start = self._take(length)
        try:
            return str(self._buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error("damaged: a string is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._skipped_array()
        if kind == _BOOL:
            return bool(self._number("B"))
        if kind not in _SCALARS:
            raise self.error(f"damaged: metadata of the unknown type {kind}")
        value = self._number(_SCALARS[kind])
        return np.float32(value) if _SCALARS[kind] == "f" else value

    def _skipped_array(self) -> _Array:
        kind, count = self._number("I"), self._number("Q")
        if count > MAX_ARRAY:
            raise self.error(f"an array of {count} elements; at most {MAX_ARRAY} are supported")
        array = _Array(kind, count, self._place)
        if kind == _STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        elif kind in _SCALARS:
            self._take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _BOOL:
            self._take(count)
        else:
            raise self.error(f"arrays of the type {kind} are not supported")
        return array

    def _tensor_table(self, count: int, size: int) -> dict[str, TensorInfo]:
        alignment = self.integer("general.alignment")
        alignment = 32 if alignment is None else alignment
        if not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(f"general.alignment {alignment} is not a power of two from 8 on")
        table: dict[str, TensorInfo] = {}
        end = 0
        for _ in range(count):
            name = self._string()
            if name in table:
                raise self.error(f"the tensor {name!r} occurs twice")
            table[name] = info = self._tensor_info(name)
            # One after the other, as llama.cpp reads them too: tensors that share their bytes
            # would take many times the size of the file once they are converted.
            if info.start != end:
                raise self.error(f"damaged: the tensor {name!r} is not where the last one ends")
            end = -(-(end + info.n_bytes) // alignment) * alignment
        start = -(-self._place // alignment) * alignment
        # a file of a vocabulary alone ends without padding
        needed = max((start + info.start + info.n_bytes for info in table.values()), default=0)
        if needed > size:
            raise self.error(
                f"truncated: the file has {size} bytes, its tensors need {needed}; "
                "download it again"
            )
        return {
            name: TensorInfo(info.type, info.shape, start + info.start)
            for name, info in table.items()
        }

    def _tensor_info(self, name: str) -> TensorInfo:
        n_dimensions = self._number("I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"the tensor {name!r} has {n_dimensions} dimensions")
        dimensions = [self._number("Q") for _ in range(n_dimensions)]
        number, start = self._number("I"), self._number("Q")
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            shown = _OTHER_TYPES.get(number, f"of type {number}")
            known = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise self.error(f"the tensor {name!r} is {shown}; supported are {known}")
        if min(dimensions) < 1 or dimensions[0] % kind.block:
            raise self.error(f"the tensor {name!r} has rows of {dimensions[0]} in {kind.name}")
        return TensorInfo(kind, tuple(reversed(dimensions)), start)
