"""What compile-budget measures on a GPU, in processes of their own.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.compile_budget.cuda_child WHAT NUMBER
DEVICE`; it prints one JSON object.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

# ruff: noqa: E402 (the imports are part of what is timed)
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from onelaunch.bench.core.gpu_forwards import random_weights
from onelaunch.bench.core.triton_store import counting
from onelaunch.bench.peers.forward import BareForward
from onelaunch.bench.studies.ane_mega_kernel.compile_budget.child import (
    Result,
    first_line,
    memory,
    repeat,
)
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.errors import RunFailed

DTYPE = "bfloat16"
SEQUENCE = 64
LAYER = preset("stories260k").with_(n_layers=1)
LAYERS = preset("stories110m").with_(vocab_size=64)
MOST_APART = 0.1
"""Of logits of many layers in bfloat16 from PyTorch's; a wrong stage's are as far as they are
large."""


@triton.jit
def number_kernel(target_ptr, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Another kernel for each number."""
    tl.store(target_ptr, NUMBER)


def again(count: int, device: torch.device) -> Result:
    """Engines with new weights each time, one after the other, and logits of each; all kernels were
    compiled for one before."""
    before = _logits(device, 0)

    def run(seed: int, folder: Path) -> None:
        nonlocal before
        logits = _logits(device, seed)
        if torch.equal(logits, before) or not bool(torch.isfinite(logits).all()):
            raise RunFailed("the logits of the weights before, or none")
        before = logits

    return _many(device, run, count)


def distinct(count: int, device: torch.device) -> Result:
    """As many kernels, compiled, loaded and launched; the first, of number 0, was before."""
    target = torch.full((1,), -1, dtype=torch.int32, device=device)
    _launch(target, 0)
    return _many(device, lambda number, folder: _launch(target, number), count)


def restart(number: int, device: torch.device) -> Result:
    """The first kernel and the second, of a number and the next, neither of them kept."""
    target = torch.full((1,), -1, dtype=torch.int32, device=device)
    _launch(target, number)
    first = time.perf_counter()
    _launch(target, number + 1)
    return {"until_first": first - _BEGAN, "second": time.perf_counter() - first}


def layers(count: int, device: torch.device) -> Result:
    """So many layers of stories110m's in one launch; the reason where it is refused."""
    from onelaunch.engines.cuda.pack import pack
    from onelaunch.engines.cuda.program import FusedForward, Shape

    config, dtype = LAYERS.with_(n_layers=count), getattr(torch, DTYPE)
    generator = torch.Generator(device=device).manual_seed(0)
    result: Result = {"seconds": 0.0, "refused": "", "weight_bytes": 0, "operations": 0}
    result["apart_from_pytorch"] = None
    try:
        weights = random_weights(config, device, generator)
        result["weight_bytes"] = sum(each.numel() for each in weights.values()) * dtype.itemsize
        tokens = _tokens(config, device)
        packed = pack(config, weights, dtype, device)
        start = time.perf_counter()
        forward = FusedForward(config, packed, Shape(1, SEQUENCE, True, dtype), {}, "all")
        forward.buffers.tokens.copy_(tokens.flatten())
        forward.run()
        forward.check()
        result["seconds"] = time.perf_counter() - start
        result["operations"] = len(forward.plan.stages)
        with torch.inference_mode():
            plain = BareForward(config, weights, dtype, device)(tokens).float()
        logits = forward.buffers.logits.view(plain.shape).float()
        apart = float((logits - plain).norm() / plain.norm())
        if not apart < MOST_APART:
            raise RunFailed(f"logits {apart:.1%} from PyTorch's")
        result["apart_from_pytorch"] = apart
    except Exception as error:  # whatever Triton or the driver raises: that is the answer
        result["refused"] = first_line(error)
    return result


def _logits(device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    weights = random_weights(LAYER, device, generator)
    engine = CudaEngine(LAYER, weights, str(device), DTYPE, fusion_depth="stage")
    return engine.logits(_tokens(LAYER, device))


def _tokens(config: ModelConfig, device: torch.device) -> Tensor:
    return torch.arange(SEQUENCE, device=device)[None] % config.vocab_size


def _launch(target: Tensor, number: int) -> None:
    number_kernel[(1,)](target, NUMBER=number)
    if int(target) != number:
        raise RunFailed(f"kernel {number} wrote {int(target)}")


def _many(device: torch.device, run: Callable[[int, Path], object], count: int) -> Result:
    def in_use() -> int:
        """Bytes of the device's memory that are in use; 0 where it does not say."""
        if device.type != "cuda":
            return 0
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # a failure before has broken the device for this process
            return 0
        return total - free

    with counting() as counts:
        result = repeat(run, range(1, 1 + count), {"bytes": memory, "gpu_bytes": in_use})
    return result | {"compilations": counts.compilations}


if __name__ == "__main__":
    actions = {"again": again, "distinct": distinct, "restart": restart, "layers": layers}
    print(json.dumps(actions[sys.argv[1]](int(sys.argv[2]), torch.device(sys.argv[3]))))
