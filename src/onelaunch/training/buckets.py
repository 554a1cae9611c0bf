"""Sum the gradients of all ranks in buckets, while the backward still computes others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from onelaunch.training.ranks import connection

BUCKET_BYTES = 25 << 20
"""As in DistributedDataParallel (Li et al. 2020, arXiv 2006.15704): large enough for bandwidth,
small enough that the first sum begins early."""


class GradientBuckets:
    """Sums the `.grad` of float32 parameters over all ranks, in flat buffers.

    A backward fills parameters about in the reverse of the order in which the forward uses them, so
    buckets are made in the reverse order of `parameters`. Which parameters share a bucket, and in
    which order buckets are summed, does not depend on time: a repeated run has the same bits.

    After `overlap` the next backward, the last of an update, has each bucket summed as soon as
    autograd has accumulated its gradients. `finish` sums the others: all of them where gradients do
    not come from autograd.
    """

    def __init__(
        self, parameters: Sequence[Tensor], n_numbers: int, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`n_numbers` is how many numbers `finish` sums with the gradients."""
        groups = group_by_size(parameters, bucket_bytes)
        self._buckets = [_Bucket(group) for group in groups[:-1]]
        self._buckets.append(_Bucket(groups[-1], n_numbers))
        self._bucket_of = {id(p): each for each in self._buckets for p in each.parameters}
        self._works: list[Any] = []
        self._overlaps = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)
            for parameter in parameters
            if parameter.requires_grad
        ]

    def overlap(self) -> None:
        """Sum buckets during the next backward."""
        self._overlaps = True

    def finish(self, numbers_N: Tensor) -> Tensor:
        """Sum what is left, and wait for all of it. Each `.grad` is then a view of a bucket, valid
        until the next backward after `overlap`, or `finish`.

        Returns the sums of `numbers_N`, on the parameters' device. Raises RankLost.
        """
        self._overlaps = False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                if id(parameter) not in bucket.taken:
                    bucket.take(parameter)
        last = self._buckets[-1]
        last.numbers_N.copy_(numbers_N, non_blocking=True)
        self._start(self._buckets)
        with connection():
            while self._works:
                self._works.pop(0).wait()
        for bucket in self._buckets:
            bucket.taken.clear()
        return last.numbers_N

    def close(self) -> None:
        """Leave the parameters alone, and drop sums that were begun."""
        for hook in self._hooks:
            hook.remove()
        self._works.clear()

    def _accumulated(self, parameter: Tensor) -> None:
        if self._overlaps:
            self._bucket_of[id(parameter)].take(parameter)
            self._start(self._buckets[:-1])  # the last one waits for the numbers

    def _start(self, buckets: Sequence[_Bucket]) -> None:
        """Sum the next of these buckets that are complete. They are taken in order, as all ranks
        must sum the same one at a time."""
        for bucket in buckets[len(self._works) :]:
            if not bucket.complete:
                return
            with connection():
                self._works.append(dist.all_reduce(bucket.flat_N, async_op=True))


@runtime_checkable
class FlatEngine(Protocol):
    """An engine whose gradients lie in one tensor, `flat.gradients_M`, and which calls
    `on_gradients`, if that is not None, as parts of them are final: from an element to another."""

    flat: Any
    on_gradients: Callable[[int, int], None] | None


class FlatBuckets:
    """As GradientBuckets, of an engine whose gradients lie in one tensor: they are summed where
    they are. Nothing is copied, and each `.grad` stays as it is."""

    def __init__(self, engine: FlatEngine, n_numbers: int) -> None:
        self._engine, self._gradients_M = engine, engine.flat.gradients_M
        self._numbers_N = torch.zeros(n_numbers, device=self._gradients_M.device)
        self._works: list[Any] = []

    def overlap(self) -> None:
        """Sum parts during the next backward."""
        self._engine.on_gradients = self._ready

    def finish(self, numbers_N: Tensor) -> Tensor:
        """Wait for all sums. Returns those of `numbers_N`, on the gradients' device. Raises
        RankLost."""
        self._engine.on_gradients = None
        if not self._works:
            self._ready(0, self._gradients_M.numel())
        self._numbers_N.copy_(numbers_N, non_blocking=True)
        with connection():
            self._works.append(dist.all_reduce(self._numbers_N, async_op=True))
            while self._works:
                self._works.pop(0).wait()
        return self._numbers_N

    def close(self) -> None:
        """Drop sums that were begun."""
        self._engine.on_gradients = None
        self._works.clear()

    def _ready(self, begin: int, end: int) -> None:
        with connection():
            part = self._gradients_M[begin:end]
            self._works.append(dist.all_reduce(part, async_op=True))


class _Bucket:
    """A buffer for the gradients of some parameters, and for some numbers after them.

    `taken` are the ids of the parameters whose gradients are in it.
    """

    def __init__(self, parameters: Sequence[Tensor], n_numbers: int = 0) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat_N = torch.zeros(
            sum(sizes) + n_numbers, dtype=torch.float32, device=parameters[0].device
        )
        *parts, self.numbers_N = self.flat_N.split([*sizes, n_numbers])
        self._views = {id(p): part.view_as(p) for p, part in zip(parameters, parts, strict=True)}
        self.taken: set[int] = set()

    @property
    def complete(self) -> bool:
        return len(self.taken) == len(self.parameters)

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """Move a gradient into the buffer: 0 if the parameter has none."""
        if id(parameter) in self.taken:
            raise RuntimeError("a gradient changed after its sum over the ranks had begun")
        view = self._views[id(parameter)]
        if parameter.grad is None:
            view.zero_()
        else:
            view.copy_(parameter.grad)
        parameter.grad = view
        self.taken.add(id(parameter))


def group_by_size(parameters: Sequence[Tensor], most_bytes: int) -> list[list[Tensor]]:
    """Divide the reversed parameters into groups of at most so many bytes, or of one parameter."""
    groups: list[list[Tensor]] = []
    n_bytes = 0
    for parameter in reversed(parameters):
        n_bytes += parameter.nbytes
        if not groups or n_bytes > most_bytes:
            groups.append([])
            n_bytes = parameter.nbytes
        groups[-1].append(parameter)
    return groups
