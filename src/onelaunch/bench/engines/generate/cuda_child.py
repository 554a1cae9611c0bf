"""The CUDA engine's first text in a fresh process.

Run as `python -m onelaunch.bench.engines.generate.cuda_child PRESET DEVICE`; it prints one JSON
object. Compiled kernels are kept in the folders that ONELAUNCH_CACHE and TRITON_CACHE_DIR name.
Times are from when Python has imported all and the GPU has a context.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

import torch

from onelaunch.bench.core.weights import random_weights
from onelaunch.config import preset
from onelaunch.engines.choice import choose
from onelaunch.engines.engine import Request
from onelaunch.errors import OnelaunchError, RunFailed

PROMPT, NEW, CONTEXT = 32, 64, 256
LONGEST_SECONDS = 120.0


def first_text(name: str, device: str) -> dict[str, float]:
    """Seconds to the first token of a prompt, to its last one, and until all kernels were there;
    whether PyTorch wrote it."""
    config = preset(name).with_(max_seq_len=CONTEXT)
    weights = random_weights(config)
    prompt = torch.randint(2, config.vocab_size, (PROMPT,), generator=torch.manual_seed(1)).tolist()
    lines: list[str] = []
    if torch.device(device).type == "cuda":
        importlib.import_module("onelaunch.engines.cuda.decoding.sessions")  # and Triton
    torch.zeros(1, device=device).item()
    began = time.perf_counter()
    engine = choose("cuda", config, weights, device, "bfloat16", log=lines.append)
    session = engine.session(1, CONTEXT)
    session.submit(Request(0, prompt, NEW))
    events = session.step()
    while not events:
        events = session.step()
    first = time.perf_counter() - began
    while events[-1].finish is None:
        events += session.step()
    written = time.perf_counter() - began
    while engine.describe().get("compiling"):
        if time.perf_counter() - began > LONGEST_SECONDS:
            raise RunFailed(f"no kernels after {LONGEST_SECONDS:g} s")
        time.sleep(0.005)
    ready = time.perf_counter() - began
    session.close()
    return {
        "first_token_seconds": first,
        "text_seconds": written,
        "kernels_seconds": ready,
        "by_pytorch": float(any("PyTorch generates" in line for line in lines)),
    }


def main() -> None:
    """Measure what the command line names."""
    try:
        print(json.dumps(first_text(*sys.argv[1:3])))
    except OnelaunchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
