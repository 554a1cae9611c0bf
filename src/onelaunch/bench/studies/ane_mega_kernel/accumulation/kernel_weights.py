"""What an update would have to make again of the weights on a GPU: for PyTorch's autocast a copy in
bfloat16, for the kernels of the CUDA engine their layout, and a CUDA graph where buffers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.timing import milliseconds
from onelaunch.bench.studies.ane_mega_kernel.program_training import Driver

REPEATS = 9


def renewals(model: str, sequence: int, training: Driver[Any], log: Log) -> Iterator[Row]:
    """A row of each, in milliseconds; none on another device, where nothing is made of them."""
    device = training.engine.device
    if device.type != "cuda":
        return
    weights = {name: p.detach() for name, p in training.engine.parameters().items()}

    def cast() -> object:
        return [w.to(torch.bfloat16) for w in weights.values()]

    case = f"CUDA {model} 1x{sequence}"
    yield _timed(f"{case}, weights cast to bfloat16", cast, training, "every micro-step")
    from onelaunch.engines.cuda import why_not

    config = training.engine.config
    if reason := why_not(device, config):
        log(f"{case}: without our kernels: {reason}")
        return
    from onelaunch.engines.cuda.pack import pack
    from onelaunch.engines.cuda.program import BoundForward, Shape

    def packed() -> Any:
        return pack(config, weights, torch.bfloat16, device)

    yield _timed(f"{case}, weights packed for our kernels", packed, training, "every update")
    bound = BoundForward(config, packed(), Shape(1, sequence, True, torch.bfloat16), {})
    bound.run()  # compiles
    torch.cuda.synchronize(device)
    when = "never: packed into the same buffers"
    yield _timed(f"{case}, a CUDA graph captured", bound.captured, training, when)


def _timed(case: str, make: Callable[[], object], training: Driver[Any], when: str) -> Row:
    samples: list[float] = []
    made: list[object] = []
    for _ in range(REPEATS + 1):
        samples.append(milliseconds(lambda: made.append(make()), training.wait))
        made.clear()  # freeing is not timed
    return Row.of(case, samples[1:], notes={"when": when})  # the first one allocates memory
