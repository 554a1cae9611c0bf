"""A process that compiles the CUDA engine's kernel for gate and up.

Its argument is JSON: a configuration, a sequence, the number of a GPU. Each line of its input is
JSON too, [block_k, num_stages, warps] of a tiling; the answer is a line: null, or why it does not
fit.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace

import torch

from onelaunch.bench.core.gpu_forwards import random_weights
from onelaunch.compilation.background import in_a_line
from onelaunch.compilation.child import lower_priority
from onelaunch.compilation.children import parent_lines
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import BoundForward, Shape, limits_of


def main() -> None:
    lower_priority()
    fields, sequence, number = json.loads(sys.argv[1])
    lines = parent_lines()
    # what a compiler may print goes to stderr
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers, suppress(BrokenPipeError):
        os.dup2(2, 1)
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        config = ModelConfig.from_dict(fields).with_(n_layers=1)
        weights = random_weights(config, device, torch.Generator(device=device).manual_seed(0))
        packed = pack(config, weights, torch.bfloat16, device)
        rule = default(config, sequence, 2, limits_of(device))
        while True:
            block_k, num_stages, warps = json.loads(lines.get())
            tile = replace(rule["gate_up"], block_k=block_k, num_stages=num_stages, warps=warps)
            shape = Shape(1, sequence, True, torch.bfloat16)
            bound = BoundForward(config, packed, shape, {**rule, "gate_up": tile})
            kinds = [stage.kind for stage in bound.plan.stages]
            try:
                bound.calls[kinds.index("gate_up")].load()
                answer = None
            except Exception as error:  # whatever Triton, its compiler or the driver raises
                answer = in_a_line(error)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
