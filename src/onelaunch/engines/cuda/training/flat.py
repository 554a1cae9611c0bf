"""A model's parameters side by side in one tensor, as the update and the products want them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onelaunch.config import ModelConfig

ALIGNMENT = 16
"""Each parameter, or group of neighbours, begins at a multiple of so many elements."""
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
GROUPS = {
    "qkv": _QKV,
    "out": ("self_attn.o_proj",),
    "gate_up": _GATE_UP,
    "down": ("mlp.down_proj",),
}
"""Of a layer: matrices whose rows follow one another, so that one product has all of them."""


SEGMENT_BYTES = 50 << 20
"""Of gradients that are ready together, at least: large enough for a network's bandwidth."""


class Segment(NamedTuple):
    """Layers whose gradients are ready together, and where those of their matrices lie."""

    layers: range
    begin: int
    end: int


class FlatParameters:
    """float32 weights and gradients of all parameters, (M,) each, and the weights once more in the
    dtype of products. First the matrices, which decay: `n_decayed` elements; then the vectors.
    What lies between two parameters is zero in all three."""

    def __init__(
        self, config: ModelConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._begin: dict[str, int] = {}
        size = 0
        for group in _groups(config, self._shapes):
            size = -(-size // ALIGNMENT) * ALIGNMENT
            for name in group:
                self._begin[name] = size
                size += math.prod(self._shapes[name])
            if len(self._shapes[group[0]]) > 1:
                self.n_decayed = size
        size = -(-size // ALIGNMENT) * ALIGNMENT
        device = next(iter(parameters.values())).device
        first = [self._begin[f"layers.{i}.{_QKV[0]}.weight"] for i in range(config.n_layers)]
        self._layer_begins = [*first, self.n_decayed]
        self.is_rounded = False
        """Whether an update has just rounded the new weights, too."""
        self.weights_M = torch.zeros(size, device=device)
        self.gradients_M = torch.zeros(size, device=device)
        self.half_M = self.weights_M
        if dtype != torch.float32:
            self.half_M = torch.zeros(size, device=device, dtype=dtype)
        for name, parameter in parameters.items():
            own = self.weight(name)
            own.copy_(parameter.detach())
            parameter.data = own

    def on_device(self) -> AbstractContextManager[Any]:
        """With its GPU as the current one."""
        device = self.weights_M.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def begin(self, name: str) -> int:
        """The index of a parameter's first element."""
        return self._begin[name]

    def view(self, flat_M: Tensor, name: str) -> Tensor:
        """A parameter's part of a flat tensor."""
        shape, begin = self._shapes[name], self._begin[name]
        return flat_M[begin : begin + math.prod(shape)].view(shape)

    def weight(self, name: str) -> Tensor:
        """A parameter, float32."""
        return self.view(self.weights_M, name)

    def gradient(self, name: str) -> Tensor:
        """A parameter's gradient, float32."""
        return self.view(self.gradients_M, name)

    def segments(self) -> list[Segment]:
        """All layers in parts of SEGMENT_BYTES, the last layers first, as a backward takes them.
        The gradients of the embedding, the head and vectors are in none."""
        found: list[Segment] = []
        high = len(self._layer_begins) - 1
        for low in reversed(range(high)):
            begin, end = self._layer_begins[low], self._layer_begins[high]
            if 4 * (end - begin) > SEGMENT_BYTES or low == 0:
                found.append(Segment(range(low, high), begin, end))
                high = low
        return found

    def half(self, layer: int, group: str) -> Tensor:
        """A layer's group of matrices in the dtype of products, (rows, columns)."""
        return self._group(self.half_M, layer, group)

    def group_gradient(self, layer: int, group: str) -> Tensor:
        """The gradient of a layer's group of matrices, (rows, columns), float32."""
        return self._group(self.gradients_M, layer, group)

    def refresh(self) -> None:
        """The weights have changed: round them for the products."""
        if self.half_M is not self.weights_M:
            self.half_M.copy_(self.weights_M)

    def _group(self, flat_M: Tensor, layer: int, group: str) -> Tensor:
        names = [f"layers.{layer}.{name}.weight" for name in GROUPS[group]]
        rows, columns = sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1]
        begin = self._begin[names[0]]
        return flat_M[begin : begin + rows * columns].view(rows, columns)


def _groups(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """All parameters, the matrices first, those of a group together."""
    yield ["embed_tokens.weight"]
    if not config.tied_embeddings:
        yield ["lm_head.weight"]
    for layer in range(config.n_layers):
        for names in GROUPS.values():
            yield [f"layers.{layer}.{name}.weight" for name in names]
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield [name]
