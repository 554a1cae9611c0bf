"""Which engine runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from onelaunch.config import ModelConfig
    from onelaunch.engines.engine import Engine

ENGINES = ("auto", "reference", "cpu")


def choose(
    name: str,
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    fusion_depth: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """The engine of a name, on a device. "auto" is the CPU engine where the device is the CPU, the
    dtype one of its own and its packages are there, and the reference engine elsewhere.

    Raises BadInput for an unknown name and for options that do not go together.
    """
    if name not in ENGINES:
        raise BadInput(f"--engine {name}: must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    from onelaunch.engines import cpu
    from onelaunch.engines.reference import ReferenceEngine, resolve_device

    on_cpu = resolve_device(device).type == "cpu"
    if name == "cpu" and not on_cpu and device != "auto":
        raise BadInput(f"--engine cpu runs on the CPU, not on {device}; leave out --device")
    if name == "auto":
        fits = on_cpu and (dtype is None or dtype in cpu.DTYPES) and cpu.why_not() is None
        name = "cpu" if fits else "reference"
    if name == "cpu":
        from onelaunch.engines.cpu.engine import CpuEngine

        return CpuEngine(config, weights, dtype, threads, fusion_depth, say)
    if fusion_depth != "auto":
        raise BadInput(
            f"--fusion-depth {fusion_depth}: the reference engine runs one operator after another; "
            "use --engine cpu"
        )
    return ReferenceEngine(config, weights, device, dtype, threads)
