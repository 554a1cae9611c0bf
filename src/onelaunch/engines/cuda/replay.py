"""A bound forward for its caller's tensors: ids are read where they lie, logits written where they
are to be, and what is in between is a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onelaunch.engines.cuda.calls import Call, CallAndProduct, captured, on, share_first_cache
from onelaunch.engines.cuda.staged import BoundForward
from onelaunch.operators.handles import KNOWN_LAUNCHERS, current_stream

Launch = Callable[[Tensor, Tensor], None]
"""Called with ids, (N,), int64, and logits, (rows, V)."""


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
                share_first_cache(first.load())
                self._first = launcher(first, bound.buffers.tokens, bound.buffers.logits)
            for call in middle:
                share_first_cache(call.load())
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
        share_first_cache(last.load())
        self._last[logits.dtype] = launcher(last, bound.buffers.tokens, logits)

    def is_prepared(self, dtype: torch.dtype) -> bool:
        """Whether `prepare` was called with logits of this dtype."""
        return dtype in self._last

    def __call__(self, ids_N: Tensor, logits: Tensor) -> None:
        last = self._last[logits.dtype]
        with self._bound.whole():
            if self._first is not None:
                self._first(ids_N, logits)
            if self._graph is not None:
                self._graph.replay()
            last(ids_N, logits)


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def launcher(call: Call, ids_N: Tensor, logits: Tensor) -> Launch:
    """A function that launches a call, on the current device and its current stream, with other
    tensors in the place of `ids_N` and `logits`: through the compiled kernel's handle where
    Triton's launcher is known (operators/handles.py)."""

    def by_triton(ids: Tensor, to: Tensor) -> None:
        call.with_tensor(ids_N, ids).with_tensor(logits, to)()

    run = call.load().run
    if torch.version.hip is not None or not _known():
        return by_triton
    if run.global_scratch_size or run.profile_scratch_size:
        return by_triton
    compiled, index = call.load(), ids_N.device.index
    constants = call.kernel.arg_names[len(call.arguments) :]
    values: list[Any] = [*call.arguments, *(call.options[name] for name in constants)]
    of_ids = [i for i, value in enumerate(values) if value is ids_N]
    of_logits = [i for i, value in enumerate(values) if value is logits]
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and value.device.type == "cuda":
            values[i] = value.data_ptr()
    # stream and function stand between the grid and these: two scratch buffers, the kernel's
    # metadata, the launch's, two hooks
    options = call.options
    flags = (
        options.get("launch_cooperative_grid", False), options.get("launch_pdl", False), None, None,
        compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    launch, function, programs = run.launch, compiled.function, call.programs

    def by_handle(ids: Tensor, to: Tensor) -> None:
        for i in of_ids:
            values[i] = ids.data_ptr()
        for i in of_logits:
            values[i] = to.data_ptr()
        launch(programs, 1, 1, current_stream(index), function, *flags, *values)

    return by_handle


def _known() -> bool:
    import triton

    return ".".join(triton.__version__.split(".")[:2]) in KNOWN_LAUNCHERS
