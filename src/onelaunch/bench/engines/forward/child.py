"""A process that reads a choice and its kernels from the stores: prints as JSON the seconds to its
first logits, and before that those in which Triton reads all of itself, once a process, to know
what it has compiled.

Its argument is JSON: a configuration, batch, sequence, and the folder of the choices.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import triton.compiler.code_generator  # noqa: F401 - what Triton imports at its first kernel
from triton.runtime.cache import triton_key

from onelaunch.bench.core.gpu_forwards import random_weights
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import kernels  # noqa: F401 - what the engine imports at its first
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.errors import RunFailed


def main() -> None:
    fields, batch, sequence, folder = json.loads(sys.argv[1])
    config, device = ModelConfig.from_dict(fields), torch.device("cuda", 0)
    generator = torch.Generator(device=device).manual_seed(0)
    weights = random_weights(config, device, generator)
    tokens = torch.randint(config.vocab_size, (batch, sequence), device=device, generator=generator)
    torch.cuda.synchronize()
    start = time.perf_counter()
    triton_key()
    of_triton = time.perf_counter() - start
    start = time.perf_counter()
    engine = CudaEngine(config, weights, "cuda", "bfloat16", store=Store(Path(folder)))
    engine.logits(tokens)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    about = engine.describe()["forms"][f"{batch}x{sequence}"]
    if "us" not in about:
        raise RunFailed("the choice was not read")
    print(json.dumps({"kept": round(seconds, 3), "triton": round(of_triton, 3)}))


if __name__ == "__main__":
    main()
