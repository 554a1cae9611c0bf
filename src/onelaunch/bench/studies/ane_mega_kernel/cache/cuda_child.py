"""A process of `bench cache` on a GPU: first logits of one engine after another, one for each seed.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.cache.cuda_child MODEL DEVICE SEED...`;
its environment says where Triton keeps its kernels. It prints READY once all is imported, waits for
a line, and prints one JSON list.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from typing import Any

import torch
import triton.compiler.code_generator  # noqa: F401 - what Triton imports at its first kernel
from triton.runtime.cache import triton_key

from onelaunch.bench.core.children import READY
from onelaunch.bench.core.gpu_forwards import random_weights
from onelaunch.bench.core.timing import synchronizer
from onelaunch.bench.core.triton_store import counting
from onelaunch.bench.peers.forward import BareForward
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.cuda import kernels  # noqa: F401 - what the engine imports at its first
from onelaunch.engines.cuda.engine import CudaEngine

DTYPE = "bfloat16"
SEQUENCE = 64
_REASON_LETTERS = 100


def first_logits(config: ModelConfig, device: torch.device, seed: int) -> dict[str, Any]:
    """First logits of a new engine with the weights of a seed: seconds until they are there, what
    Triton did meanwhile, a digest of their bits, and their relative distance from PyTorch's, None
    where they are no numbers; or `error`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    weights = random_weights(config, device, generator)
    tokens = torch.arange(SEQUENCE, device=device)[None] % config.vocab_size
    synchronizer(device)()
    result: dict[str, Any] = {"digest": "", "apart": None, "error": ""}
    with counting() as counts:
        start = time.perf_counter()
        try:
            engine = CudaEngine(config, weights, str(device), DTYPE, fusion_depth="stage")
            logits = engine.logits(tokens)
            synchronizer(device)()
            result["seconds"] = time.perf_counter() - start
            result["digest"] = hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()
            with torch.inference_mode():
                plain = BareForward(config, weights, getattr(torch, DTYPE), device)(tokens).float()
                apart = float((logits - plain).norm() / plain.norm())
                result["apart"] = apart if math.isfinite(apart) else None
        except Exception as error:  # whatever Triton or the driver raises of a damaged kernel
            result["seconds"] = time.perf_counter() - start
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            result["error"] = line[:_REASON_LETTERS]
    return result | {"compilations": counts.compilations, "hits": counts.hits}


def main(model: str, device: str, *seeds: str) -> list[dict[str, Any]]:
    place = torch.device(device)
    torch.zeros(1, device=place)  # opens the device
    triton_key()  # it reads all of itself, once a process
    print(READY, flush=True)
    sys.stdin.readline()
    return [first_logits(preset(model), place, int(seed)) for seed in seeds]


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
    os._exit(0)  # a device that a kernel has broken may fail, or wait, when it is let go
