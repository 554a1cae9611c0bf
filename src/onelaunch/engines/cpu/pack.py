"""Weights as the compiled program reads them: one block of memory, in the order of reading.

A matrix is groups of `tile` rows; in a group lie `lanes` columns of each row, then the next of
each, padded with zeros to whole groups and PAD columns, in float32 or bfloat16. q, k and v are one
matrix; gate and up alternate by tiles. Norms are float32.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.layout import PAD, Layer

_ALIGN = 128


def padded(n: int, to: int = PAD) -> int:
    return -(-n // to) * to


class Memory:
    """Zeroed memory of its own, in large pages where requested and the system has them."""

    def __init__(self, size: int, large_pages: bool = True) -> None:
        size = max(size, mmap.PAGESIZE)
        if hasattr(mmap, "MAP_PRIVATE"):  # shared memory gets no large pages
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._map = mmap.mmap(-1, size)
        if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.size = size

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the memory."""
        count = 1
        for extent in shape:
            count *= extent
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)


class PackedWeights:
    """A model's weights, packed once for vectors of `lanes` and tiles of `tile` rows.

    `tables` has the addresses of each layer's `Layer` fields; `embedding`, `head` and `final_norm`
    are addresses; `n_bytes` is what all of it takes.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        lanes: int,
        tile: int,
    ) -> None:
        self.dtype, self._lanes, self._tile = dtype, lanes, tile
        self._size = _ALIGN  # never offset 0: in the tables 0 means that there is no such weight
        self._copies: list[tuple[int, list[Tensor], bool]] = []
        c, w = config, weights
        embedding = head = self._matrix(w["embed_tokens.weight"])
        if not c.tied_embeddings:
            head = self._matrix(w["lm_head.weight"])
        final_norm = self._vector(w["norm.weight"])
        layers = []
        for i in range(c.n_layers):
            attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
            row = [0] * Layer.LENGTH
            row[Layer.INPUT_NORM] = self._vector(w[f"layers.{i}.input_layernorm.weight"])
            row[Layer.QKV] = self._matrix(*(w[attention + f"{x}_proj.weight"] for x in "qkv"))
            if c.qkv_bias:
                row[Layer.QKV_BIAS] = self._vector(
                    *(w[attention + f"{x}_proj.bias"] for x in "qkv")
                )
            if c.qk_norm:
                row[Layer.Q_NORM] = self._vector(w[attention + "q_norm.weight"])
                row[Layer.K_NORM] = self._vector(w[attention + "k_norm.weight"])
            row[Layer.O_PROJ] = self._matrix(w[attention + "o_proj.weight"])
            row[Layer.POST_NORM] = self._vector(w[f"layers.{i}.post_attention_layernorm.weight"])
            gate, up = w[mlp + "gate_proj.weight"], w[mlp + "up_proj.weight"]
            row[Layer.GATE_UP] = self._matrix(gate, up, alternate=True)
            row[Layer.DOWN] = self._matrix(w[mlp + "down_proj.weight"])
            layers.append(row)
        self.memory = Memory(self._size)
        for offset, tensors, alternate in self._copies:
            self._copy(offset, tensors, alternate)
        del self._copies
        base = self.memory.address
        self.embedding, self.head, self.final_norm = (
            base + embedding,
            base + head,
            base + final_norm,
        )
        self.tables = [[base + offset if offset else 0 for offset in row] for row in layers]
        self.n_bytes = self._size

    def _matrix(self, *tensors: Tensor, alternate: bool = False) -> int:
        columns = padded(tensors[0].shape[1])
        if alternate:
            rows = sum(padded(len(tensor), self._tile) for tensor in tensors)
        else:
            rows = padded(sum(map(len, tensors)), self._tile)
        return self._place(rows * columns * self.dtype.itemsize, list(tensors), alternate)

    def _vector(self, *tensors: Tensor) -> int:
        return self._place(4 * padded(sum(map(len, tensors))), list(tensors), False)

    def _place(self, size: int, tensors: list[Tensor], alternate: bool) -> int:
        offset = padded(self._size, _ALIGN)
        self._size = offset + size
        self._copies.append((offset, tensors, alternate))
        return offset

    def _copy(self, offset: int, tensors: list[Tensor], alternate: bool) -> None:
        if tensors[0].dim() == 1:
            whole = torch.cat(tensors)
            self.memory.tensor(offset, tuple(whole.shape), torch.float32).copy_(whole)
            return
        columns = tensors[0].shape[1]
        blocks = padded(columns) // self._lanes
        shape = (blocks, self._tile, self._lanes)
        if alternate:
            groups = padded(len(tensors[0]), self._tile) // self._tile
            to = self.memory.tensor(offset, (groups, len(tensors), *shape), self.dtype)
            for i, tensor in enumerate(tensors):
                self._fill(to[:, i], tensor, 0)
            return
        groups = padded(sum(map(len, tensors)), self._tile) // self._tile
        to = self.memory.tensor(offset, (groups, *shape), self.dtype)
        at = 0
        for tensor in tensors:
            self._fill(to, tensor, at)
            at += len(tensor)

    def _fill(self, to_GBTL: Tensor, tensor: Tensor, first: int) -> None:
        """Put a matrix's rows at row `first` and after."""
        lanes, columns = self._lanes, tensor.shape[1]
        whole = columns // lanes * lanes
        row = 0
        while row < len(tensor):
            group, at = divmod(first + row, self._tile)
            # whole groups at once, up to some megabytes of them: the copy is done out of caches
            groups = min((len(tensor) - row) // self._tile, 4096) if at == 0 else 0
            n = groups * self._tile or min(self._tile - at, len(tensor) - row)
            part = tensor[row : row + n]
            if groups:
                target = to_GBTL[group : group + groups]
                source = part.unflatten(0, (groups, self._tile))
            else:
                target, source = to_GBTL[group : group + 1, :, at : at + n], part[None]
            target[:, : whole // lanes].copy_(
                source[..., :whole].unflatten(-1, (-1, lanes)).transpose(1, 2)
            )
            if whole < columns:
                target[:, whole // lanes, :, : columns - whole].copy_(source[..., whole:])
            row += n
