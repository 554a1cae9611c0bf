"""The operands that stages are bound to: tensors and tiles, as their operands name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking, Limits, blocks
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.stages.common import (
    Blocks,
    Cut,
    Residual,
    ResidualExtents,
    Stage,
    constant,
)
from onelaunch.plan import Tiling
from onelaunch.plan.tiles import columns_of


@dataclass(frozen=True)
class Buffers:
    """tokens: (N,), int64; x: (N, D); partial_sumsq: (column tiles of x, N), float32; qkv: (layers
    that have their own, N, (H + 2 K) E); attn_out: (N, H E); hidden: (N, F); logits: (rows, V); of:
    (rows,), int32, the rows of x that they are of, ascending; positions: (N,), int32, the rows'
    positions for the rotary embedding, or None where row i has i % sequence."""

    tokens: Tensor
    x: Tensor
    partial_sumsq: Tensor
    qkv: Tensor
    attn_out: Tensor
    hidden: Tensor
    logits: Tensor
    of: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Chunks:
    """Buffers in which attention's chunks leave their results and count themselves, for all layers:
    float32, and (tiles,), int32."""

    count: int
    partial: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class Bound:
    """A stage with its operands, the descriptors of a product's two sides where its blocks come by
    them, whether it has a warm-up pass, and whether its last tiles take longest."""

    tile: Any
    operands: Any
    cut: Cut
    x_desc: Any = None
    w_desc: Any = None
    warmup: bool = False
    backwards: bool = False

    @property
    def stage(self) -> Stage:
        """As a kernel is handed it."""
        return Stage(self.tile, self.operands, constant(self.cut))

    def reading(self, cut: Cut, first: Cut | None = None) -> Stage:
        """As one launch is handed it, with how that which it reads is cut."""
        return replace(self, cut=replace(self.cut, read=cut, read_first=first)).stage


class Sides(NamedTuple):
    """A product's two sides, as tensors or as descriptors, with its blocks."""

    x: Tensor | None
    w: Tensor | None
    x_desc: Any
    w_desc: Any
    blocks: Blocks
    warmup: bool


@dataclass(frozen=True)
class Sources:
    """The tensors and tiles that the stages of a forward are bound to. `status` is where one launch
    writes that it timed out, (1,), int32, or None."""

    config: ModelConfig
    packed: PackedModel
    buffers: Buffers
    blockings: Mapping[str, Blocking]
    tilings: Mapping[str, Tiling]
    limits: Limits
    chunks: Chunks | None = None
    status: Tensor | None = None

    @property
    def residual(self) -> Residual:
        """The residual stream."""
        b, c = self.buffers, self.config
        sums = b.partial_sumsq.shape[0]
        extents = constant(ResidualExtents(c.dim, sums))
        return Residual(b.x, b.partial_sumsq, c.norm_eps, extents)

    def qkv(self, layer: int | None) -> Tensor:
        """Queries, keys and values of a layer, where each has its own, or of all."""
        every = self.buffers.qkv
        return every if layer is None or len(every) == 1 else every[layer]

    def cut(self, kind: str, rows_of: int) -> Cut:
        """How a kind is cut into tiles by its tiling."""
        columns = -(-columns_of(self.config, kind) // self.tilings[kind].columns)
        return Cut(rows_of, self.tilings[kind].rows, columns, waited_for=kind != "head")

    def sides(self, kind: str, layer: int | None, x: Tensor) -> Sides:
        """The sides of a kind's product: of one layer, or of all where a kernel counts them. Blocks
        of one layer come by the tensor memory accelerator from rows of whole 16 bytes, all of them,
        and where a tile's last columns are not the next tile's first."""
        blocking, weight = self.blockings[kind], self.packed.weight(kind, layer)
        BK, TAIL = blocks(weight.shape[-1], blocking)
        row_bytes = weight.shape[-1] * weight.element_size()
        every_row = kind != "head" or self.buffers.of.shape[0] == x.shape[0]
        apart = kind != "qkv" or self.tilings[kind].columns == blocking.columns
        fits = blocking.num_stages > 0 and row_bytes % 16 == 0 and every_row and apart
        tma = blocking.tma and fits and self.limits.tma and layer is not None
        product = Blocks(blocking.rows, blocking.columns, BK, TAIL, blocking.num_stages, tma)
        if tma:
            x_desc, w_desc = (
                descriptor(x, blocking.rows, BK), descriptor(weight, blocking.columns, BK)
            )  # fmt: skip
            return Sides(None, None, x_desc, w_desc, product, blocking.warmup_pass)
        return Sides(x, weight, None, None, product, blocking.warmup_pass)


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """How the tensor memory accelerator fetches blocks of a matrix."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
