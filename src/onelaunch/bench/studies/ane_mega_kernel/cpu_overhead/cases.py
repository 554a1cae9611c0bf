"""What a step needs of the host besides arithmetic, as calls that can be timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from onelaunch.bench.core.timing import milliseconds, synchronizer
from onelaunch.config import ModelConfig
from onelaunch.model import Model

BUFFERS, BUFFER_BYTES = 133, 144_000_000 // 133
SUMS, ELEMENTS = 24, 768 * 256
LOCKS = 228
"""The study's counts: 144 MB in 133 buffers, 4.7 million elements in 24 sums."""
PAGE = 4096
CALLS = 2000
"""Of what takes a microsecond: one sample is so many."""
STEPS, WARM_STEPS = 20, 3
STEP_MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=512, max_seq_len=64
)

Call = Callable[[], None]
Sample = Callable[[], float]
"""One sample in milliseconds, or, of what is called CALLS times, in microseconds a call."""


def timed(calls: Mapping[str, Call]) -> dict[str, Sample]:
    """Milliseconds of each."""
    return {name: partial(milliseconds, call) for name, call in calls.items()}


def of_each(call: Callable[[], object], calls: int) -> float:
    """Microseconds a call, many back to back; the loop's own part is in it."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - start) / calls


def allocations() -> dict[str, Call]:
    """133 buffers, all of them there before the first is freed."""

    def numpy() -> None:
        [np.empty(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]

    def pytorch() -> None:
        [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]

    def written() -> None:
        for buffer in [np.empty(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]:
            buffer[::PAGE] = 1

    return {"numpy": numpy, "torch": pytorch, "every page written": written}


def copies() -> dict[str, Call]:
    """The buffers' contents, into buffers that are there."""
    sources = [np.ones(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]
    targets = [np.zeros(BUFFER_BYTES, np.uint8) for _ in range(BUFFERS)]
    pairs = list(zip(targets, sources, strict=True))
    tensors = [(torch.from_numpy(target), torch.from_numpy(source)) for target, source in pairs]

    def numpy() -> None:
        for target, source in pairs:
            np.copyto(target, source)

    def pytorch() -> None:
        for target, source in tensors:
            target.copy_(source)

    return {"numpy": numpy, "torch": pytorch}


def sums() -> dict[str, Call]:
    """float32, in place."""
    a, b = (np.ones((SUMS, ELEMENTS), np.float32) for _ in range(2))
    a_torch, b_torch = torch.from_numpy(a), torch.from_numpy(b)

    def numpy() -> None:
        for left, right in zip(a, b, strict=True):
            np.add(left, right, out=left)

    def pytorch() -> None:
        for left, right in zip(a_torch, b_torch, strict=True):
            left.add_(right)

    return {"numpy": numpy, "torch": pytorch}


def locks() -> dict[str, Call]:
    """Acquired and released by one thread."""
    lock = threading.Lock()

    def pairs() -> None:
        for _ in range(LOCKS):
            lock.acquire()
            lock.release()

    return {"threading": pairs}


def dispatch(device: torch.device) -> Sample:
    """The cost of one operation of PyTorch on one number, from Python; on a GPU without waiting for
    it."""
    x, y = (torch.ones(1, device=device) for _ in range(2))

    def sample() -> float:
        took = of_each(lambda: x.add_(y), CALLS)
        synchronizer(device)()
        return took

    return sample


class TrainingStep:
    """Steps of a small model, which read the loss after each, or never."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        model = Model(STEP_MODEL).init_weights(0).to(device)
        self._model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(0)
        shape = (2, 4, STEP_MODEL.max_seq_len)
        made = torch.randint(STEP_MODEL.vocab_size, shape, generator=generator)
        self._tokens, self._targets = made.to(device)

    def sample(self, synchronize: bool) -> float:
        """Milliseconds a step, the wait for the last one with it."""
        for _ in range(WARM_STEPS):
            self._step()
        synchronizer(self.device)()
        start = time.perf_counter()
        for _ in range(STEPS):
            loss = self._step()
            if synchronize:
                loss.item()
        synchronizer(self.device)()
        return 1e3 * (time.perf_counter() - start) / STEPS

    def _step(self) -> torch.Tensor:
        loss = self._model.loss(self._tokens, self._targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()
