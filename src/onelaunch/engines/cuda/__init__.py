"""A model on a GPU: stages in Triton, tiled as the plan says, with fewer kernel launches.

`pack` lays the weights out for the stages, `blocking` chooses the tiles of each, `stages` holds the
code of the tiles and binds it to tensors. `kernels` are the two kernels that run them, one stage a
launch or any range of them in one; `program` binds a forward to its buffers and launches it in
either form; `sync` is how tiles of one launch wait for one another, `calls` and `replay` how
kernels are launched. `tracer`, `trace` and `timeline` record when each tile of one launch ran.
`forms` names both forms, `engine` answers with one of them, and `tuning` finds the fastest by
measuring. `decoding` generates: sessions, and the kernels of one token. `training` has the training
step: its kernels, and what runs them as CUDA graphs.

`why_not` and `why_not_train` check what the engine can run without importing it.
"""

from __future__ import annotations

import os
import shutil
from importlib import util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from onelaunch.config import ModelConfig

DTYPES = ("bfloat16", "float16", "float32")
TEXT = "text"
"""The fusion depth of a whole text in one launch; a forward's form is then as with "auto"."""
WIDEST_HEAD = 128
LEAST_CAPABILITY = (8, 0)  # of NVIDIA's: products of bfloat16
_TRUE = ("1", "true", "yes", "on", "y")


def why_not(device: torch.device, config: ModelConfig | None = None) -> str | None:
    """Why this engine cannot run a model on a device; None where it can."""
    if device.type != "cuda":
        return f"it runs on a GPU, and the device is {device}"
    from onelaunch.engines.checks import not_computed

    if config is not None and (reason := not_computed(config)):
        return reason
    if util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in _TRUE:
        return "Triton interprets in this process (TRITON_INTERPRET)"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton needs a C compiler, and there is no gcc or clang"
    import torch

    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            least, has = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
            return f"it needs compute capability {least}, and {device} has {has}"
    if config is not None and config.head_dim > WIDEST_HEAD:
        return f"its heads are at most {WIDEST_HEAD} wide, the model's are {config.head_dim}"
    return None


def why_not_train(device: torch.device, config: ModelConfig) -> str | None:
    """Why this engine cannot train a model on a device; None where it can."""
    import torch

    if device.type != "cuda" or torch.version.hip is not None:
        return f"it trains on NVIDIA's GPUs, and the device is {device}"
    if config.head_dim % 8:
        return "the width of its heads is no multiple of 8"
    return why_not(device, config)
