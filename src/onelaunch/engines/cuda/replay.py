"""A bound forward for its caller's tensors: ids are read where they lie, logits written where they
are to be, and what is in between is a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from onelaunch.engines.cuda.calls import (
    Call,
    CallAndProduct,
    Launch,
    captured,
    launcher,
    on,
    prefer_shared_memory,
)
from onelaunch.engines.cuda.program import BoundForward


class Replay:
    """`bound.launch` as a function, called with the same tensors. The first call and the last,
    which read the ids and write the logits, are launched; the others are captured when this is
    made and replayed. Before the first use of a dtype of logits, `prepare`. Both load kernels: one
    thread at a time may do so.
    """

    def __init__(self, bound: BoundForward) -> None:
        self._bound = bound
        self._last: dict[torch.dtype, Launch] = {}
        first, *rest = bound.calls
        middle = [call if isinstance(call, Call) else call.call for call in rest]
        if not rest or isinstance(rest[-1], Call):
            middle = middle[:-1]  # else the product alone is the last
        self._first: Launch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        device = bound.buffers.x.device
        # the stream that is the current one stays it where capturing fails, too
        with on(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            if rest:
                assert isinstance(first, Call)
                prefer_shared_memory(first.load())
                self._first = launcher(first, bound.buffers.tokens, bound.buffers.logits)
            for call in middle:
                prefer_shared_memory(call.load())
            if middle:
                torch.cuda.synchronize(device)
                self._graph = captured(partial(_call_all, middle), device)

    def prepare(self, logits: Tensor) -> None:
        """Load what writes logits of this one's dtype."""
        bound = self._bound
        last = bound.last_call(logits)
        if isinstance(last, CallAndProduct):  # its rows are those of the graph
            product = bound.calls[-1]
            assert isinstance(product, CallAndProduct)
            self._last[logits.dtype] = lambda ids_N, to: product.multiply(to)
            return
        prefer_shared_memory(last.load())
        self._last[logits.dtype] = launcher(last, bound.buffers.tokens, logits)

    def is_prepared(self, dtype: torch.dtype) -> bool:
        """Whether `prepare` was called with logits of this dtype."""
        return dtype in self._last

    def __call__(self, ids_N: Tensor, logits: Tensor) -> None:
        last = self._last[logits.dtype]
        try:  # a context manager would take the host a microsecond
            if self._first is not None:
                self._first(ids_N, logits)
            if self._graph is not None:
                self._graph.replay()
            last(ids_N, logits)
        except BaseException:
            self._bound.break_off()
            raise


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
