"""The data types of a plan: buffers, stages that read and write them, and the plan itself.

The content of a buffer has versions: each write makes the next one, each read names the version
that it needs. A read that comes too early or too late is found without running anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from onelaunch.config import ModelConfig
from onelaunch.plan.kinds import KINDS, NO_LAYER, is_cache

Role = Literal["input", "state", "scratch", "output"]
"""When the content of a buffer is live: `input` before the first stage, `state` (the caches) before
and after, `scratch` between stages only, `output` after the last."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Storage of `shape` numbers of `itemsize` bytes each."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    role: Role = "scratch"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.itemsize

    @property
    def live_in(self) -> bool:
        """Whether the buffer has content (version 0) before the first stage."""
        return self.role in ("input", "state")

    @property
    def live_out(self) -> bool:
        """Whether the last version is needed after the last stage."""
        return self.role in ("state", "output")


class Access(NamedTuple):
    """A read or write of `nbytes` bytes of one version of a buffer."""

    buffer: str
    version: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Work between two dependencies of the model.

    `weights` are canonical names. `weight_bytes` are the bytes read of them: all of them, except in
    `embed`, which reads the rows that it looks up. `flops` are additions, multiplications,
    divisions and functions of one number. `layer` is NO_LAYER outside the layers. A stage reads
    before it writes.
    """

    kind: str
    layer: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    weights: tuple[str, ...]
    weight_bytes: int
    flops: int

    @property
    def label(self) -> str:
        return self.kind if self.layer == NO_LAYER else f"layer {self.layer} {self.kind}"

    @property
    def code(self) -> tuple[int, int]:
        """(index in KINDS, layer): the operation code that a compiled program takes."""
        return KINDS.index(self.kind), self.layer

    @property
    def totals(self) -> Totals:
        return Totals(
            weight_bytes=self.weight_bytes,
            activation_bytes_read=_bytes(self.reads, of_cache=False),
            activation_bytes_written=_bytes(self.writes, of_cache=False),
            cache_bytes_read=_bytes(self.reads, of_cache=True),
            cache_bytes_written=_bytes(self.writes, of_cache=True),
            flops=self.flops,
        )


class Totals(NamedTuple):
    """Bytes moved and operations done. Bytes count once for each stage that needs them: the memory
    traffic where no stage keeps anything of the previous one in cache or registers."""

    weight_bytes: int
    activation_bytes_read: int
    activation_bytes_written: int
    cache_bytes_read: int
    cache_bytes_written: int
    flops: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A forward of `batch` sequences, `sequence` new tokens each, after `past` cached positions."""

    config: ModelConfig
    batch: int
    sequence: int
    past: int
    weight_itemsize: int
    activation_itemsize: int
    stages: tuple[Stage, ...]
    buffers: tuple[Buffer, ...]

    def buffer(self, name: str) -> Buffer:
        """Return the buffer of this name; raises KeyError for an unknown name."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    @property
    def totals(self) -> Totals:
        return add_totals(self.stages)


def add_totals(stages: tuple[Stage, ...]) -> Totals:
    """Sum the totals of several stages."""
    columns = zip(*(stage.totals for stage in stages), strict=True)
    return Totals(*map(sum, columns)) if stages else Totals(0, 0, 0, 0, 0, 0)


def _bytes(accesses: tuple[Access, ...], of_cache: bool) -> int:
    return sum(a.nbytes for a in accesses if is_cache(a.buffer) == of_cache)
