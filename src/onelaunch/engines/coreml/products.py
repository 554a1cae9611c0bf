"""The gradients of weights, computed in a thread of their own while the backward goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.coreml import gradients
from onelaunch.engines.coreml.emit import tap_name
from onelaunch.engines.coreml.step_clock import PRODUCTS, Clock


def single_core_thread(name: str) -> ThreadPoolExecutor:
    """A thread next to the one that trains, whose operations take one core. With teams of both,
    libgomp has more threads than cores, and from then on its threads sleep where they would wait
    for a moment: operations of either take several times as long (docs/log.md)."""
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(1, name)
    executor.submit(_take_one_core).result()
    torch.set_num_threads(threads)  # for threads that are yet to come
    return executor


def _take_one_core() -> int:
    torch.set_num_threads(1)
    return torch.get_num_threads()  # a thread that has not called this takes the number set last


class Products:
    """The gradients of the layers' weights, each begun in another thread as soon as what it is a
    product of is `known`, while the backward goes on."""

    def __init__(
        self,
        config: ModelConfig,
        known: dict[str, Tensor],
        executor: ThreadPoolExecutor,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self.futures: dict[str, Future[Tensor]] = {}
        """By canonical name of the weight."""
        self._known, self._executor = known, executor
        self._missing: dict[str, set[str]] = {}
        self._readers: dict[str, list[str]] = {}
        self._products: dict[str, gradients.Product] = {}
        for layer in range(config.n_layers):
            values = _OfLayer(known, layer)
            self._products |= gradients.products(config, layer, values)
            for name, reads in gradients.operands(config).items():
                weight = f"layers.{layer}.{name}.weight"
                taps = {tap_name(layer, each) for each in reads}
                self._missing[weight] = taps - known.keys()
                for tap in taps:
                    self._readers.setdefault(tap, []).append(weight)

    @property
    def is_whole(self) -> bool:
        """Whether all of them have begun."""
        return len(self.futures) == len(self._products)

    def know(self, name: str, value: Tensor) -> None:
        """Add a value by the name of its tap or gradient."""
        self._known[name] = value
        for weight in self._readers.get(name, ()):
            missing = self._missing[weight]
            missing.discard(name)
            if not missing and weight not in self.futures:
                self.futures[weight] = self._executor.submit(self._multiply, self._products[weight])

    def _multiply(self, product: gradients.Product) -> Tensor:
        with self._clock(PRODUCTS):
            return product()


class _OfLayer(Mapping[str, Tensor]):
    """Values by the names of one layer's taps."""

    def __init__(self, known: Mapping[str, Tensor], layer: int) -> None:
        self._known, self._prefix = known, tap_name(layer, "")

    def __getitem__(self, name: str) -> Tensor:
        return self._known[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        of = (name for name in self._known if name.startswith(self._prefix))
        return (name.removeprefix(self._prefix) for name in of)

    def __len__(self) -> int:
        return sum(1 for _ in self)
