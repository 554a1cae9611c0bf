"""What each kind of a training step's work takes on a GPU: events between its launches, which are
captured with them in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

PRODUCT, WEIGHT_GRADIENT, ATTENTION = "product", "weight_gradient", "attention"
_NORM, _ROTATION, _SWIGLU, _LOSS, _EMBEDDING = "norm", "rotation", "swiglu", "loss", "embedding"
KINDS = {
    "embed_norm_kernel": _NORM, "add_norm_kernel": _NORM, "norm_backward_kernel": _NORM,
    "sum_partials_kernel": _NORM, "rotate_kernel": _ROTATION, "rotate_backward_kernel": _ROTATION,
    "attention_forward_kernel": ATTENTION, "attention_delta_kernel": ATTENTION,
    "attention_backward_kernel": ATTENTION, "swiglu_kernel": _SWIGLU,
    "swiglu_backward_kernel": _SWIGLU, "gate_up_swiglu_kernel": PRODUCT,
    "down_back_swiglu_kernel": PRODUCT, "cross_entropy_kernel": _LOSS,
    "cross_entropy_blocks_kernel": _LOSS, "count_targets_kernel": _LOSS, "sum_loss_kernel": _LOSS,
    "sort_tokens_kernel": _EMBEDDING, "embedding_gradient_kernel": _EMBEDDING,
    "join_edges_kernel": _EMBEDDING,
}  # fmt: skip
"""Of each kernel; those of the update are in no micro-step. A product with SwiGLU is a product."""

_watchers: list[Callable[[str], None]] = []


def launched(kind: str) -> None:
    """Something of a kind has been launched on the current stream."""
    for watcher in _watchers:
        watcher(kind)


class KindEvents:
    """The events of a captured part of a step. They are recorded anew with each replay."""

    def __init__(self) -> None:
        self._events: list[tuple[str, torch.cuda.Event]] = []

    @contextmanager
    def watching(self, part: str) -> Iterator[None]:
        """Record an event after each launch in here, all of which are on one stream."""
        watcher = lambda kind: self._record(f"{part}_{kind}")  # noqa: E731
        self._record("")
        _watchers.append(watcher)
        try:
            yield
        finally:
            _watchers.remove(watcher)

    def _record(self, kind: str) -> None:
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        self._events.append((kind, event))

    def seconds(self) -> dict[str, float] | None:
        """The seconds of each kind in the last replay; None while it runs."""
        if not self._events[-1][1].query():
            return None
        total: dict[str, float] = {}
        for (_, before), (kind, after) in pairwise(self._events):
            total[kind] = total.get(kind, 0.0) + before.elapsed_time(after) * 1e-3
        return total
