"""Choose the engine that runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from onelaunch.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from onelaunch.config import ModelConfig
    from onelaunch.engines.engine import Engine

ENGINES = ("auto", "reference", "cpu", "cuda", "coreml")


def choose(
    engine: str,
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    fusion_depth: str = "auto",
    log: Callable[[str], None] = lambda line: None,
) -> Engine:
    """The engine of a name, on a device, computing in a dtype: a name or PyTorch's own. "auto" is
    the device's own engine, where its packages are there and it computes in the dtype, and the
    reference engine elsewhere; on a GPU also where float32 or a number of threads is requested.

    Raises BadInput for an unknown name and for options that do not go together.
    """
    if engine not in ENGINES:
        raise BadInput(f"engine={engine!r}: must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    from onelaunch.engines.reference import ReferenceEngine, resolve_device

    if dtype is not None:
        dtype = str(dtype).removeprefix("torch.")
    on = resolve_device(device)
    if engine == "cpu" and on.type != "cpu" and device != "auto":
        raise BadInput(f"device={device!r}: engine='cpu' runs on the CPU; leave it out")
    if engine == "cuda" and threads is not None:
        raise BadInput(f"threads={threads}: the CUDA engine computes on the GPU; leave it out")
    if engine == "auto":
        engine = automatic(on, config, dtype, threads)
        if engine == "reference" and (reason := _why_pytorch(on, config)):
            log(f"PyTorch runs this model, as the engine for this device cannot: {reason}")
    if engine == "cuda":
        from onelaunch.engines.cuda.engine import CudaEngine

        return CudaEngine(config, weights, device, dtype, fusion_depth, log, meanwhile=True)
    if engine == "coreml":
        if device not in ("auto", "cpu"):
            raise BadInput(
                f"device={device!r}: engine='coreml' evaluates programs on the CPU; leave it out"
            )
        if threads is not None:
            raise BadInput(
                f"threads={threads}: engine='coreml' evaluates programs on one thread; leave it out"
            )
        from onelaunch.engines.coreml.engine import CoreMLEngine

        return CoreMLEngine(config, weights, dtype, fusion_depth, log)
    if engine == "cpu":
        from onelaunch.engines.cpu.engine import CpuEngine

        return CpuEngine(config, weights, dtype, threads, fusion_depth, log)
    if fusion_depth != "auto":
        raise BadInput(
            f"fusion_depth={fusion_depth!r}: the reference engine runs one operator after another; "
            "use engine='cpu', or engine='cuda' on a GPU"
        )
    return ReferenceEngine(config, weights, device, dtype, threads)


def _why_pytorch(device: torch.device, config: ModelConfig) -> str | None:
    """What a model has that a device's own engine does not compute; None where it computes all."""
    from onelaunch.engines.checks import not_computed, not_planned

    return not_planned(config) if device.type == "cpu" else not_computed(config)


def automatic_for_evaluation(
    device: torch.device, config: ModelConfig, dtype: str, threads: int | None
) -> str:
    """The engine that "auto" selects for the logits of whole batches: the CUDA engine, in float32
    too, where it runs; elsewhere the reference engine. On a CPU PyTorch's products of a batch are
    faster than the CPU engine's: logits of 8x256 take that 1.25 to 1.35 times as long."""
    if device.type == "cuda" and threads is None:
        from onelaunch.engines import cuda

        if dtype in cuda.DTYPES and cuda.why_not(device, config) is None:
            return "cuda"
    return "reference"


def automatic(
    device: torch.device, config: ModelConfig | None, dtype: str | None, threads: int | None
) -> str:
    """The engine that "auto" selects on a device; for one model, unless `config` is None."""
    if device.type == "cpu":
        from onelaunch.engines import cpu

        fits = config is None or _why_pytorch(device, config) is None
        if fits and (dtype is None or dtype in cpu.DTYPES) and cpu.why_not() is None:
            return "cpu"
    if device.type == "cuda" and dtype in (None, "bfloat16", "float16") and threads is None:
        from onelaunch.engines import cuda

        if cuda.why_not(device, config) is None:
            return "cuda"
    return "reference"
