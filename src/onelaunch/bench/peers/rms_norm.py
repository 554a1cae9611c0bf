"""RMSNorm as others have it, and ours in its forms: all as `norm(x, weight) -> y`.

A peer runs as its users get it. Liger is there three times: as released, with its row path forced,
and with the published block-row rule (Liger-Kernel#1238) in place of its own thresholds.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.operators.rms_norm import rms_norm

EPS = 1e-6

Norm = Callable[[Tensor, Tensor], Tensor]

# What Liger asks before it takes its row path, and what the published rule asks.
LIGER_CONDITION = "BLOCK_SIZE > 256 or n_rows < 4096 * 8 or row_mode"
SOURCE_CONDITION = "BLOCK_SIZE > 512 or n_rows < 4096 or row_mode"


@dataclass(frozen=True)
class Contender:
    """`fresh()` gives the norm for one shape, made anew. `form`: one of ours, no peer. `in_place`:
    writes dX over the incoming gradient. `sibling`: has the host path of another contender, and is
    not timed for its own."""

    name: str
    fresh: Callable[[], Norm]
    form: bool = False
    in_place: bool = False
    sibling: bool = False


def ours() -> list[Contender]:
    """`ours`, by automatic choice; then with each path forced, and by the published rule."""

    def norm(**how: str) -> Callable[[], Norm]:
        return lambda: lambda x, weight: rms_norm(x, weight, EPS, **how)  # type: ignore[arg-type]

    return [
        Contender("ours", lambda: _ours, form=True),
        Contender("row", norm(row_mode="row"), form=True, sibling=True),
        Contender("block", norm(row_mode="block"), form=True, sibling=True),
        Contender("source", norm(rule="source"), form=True, sibling=True),
    ]


def without_kernel(say: Callable[[str], None]) -> None:
    """Say, instead of the operator's own warning, that the plain form runs here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rms_norm(torch.ones(1, 1))
    say("there is no kernel on this device: ours is the plain PyTorch form")


def peers(device: torch.device, say: Callable[[str], None]) -> list[Contender]:
    """Those that run on a device; what is missing is said."""
    found = [Contender("torch", lambda: _torch), Contender("torch.compile", _compiled)]
    if device.type == "cuda":
        found += _liger(say) + _quack(say)
    return found


def torch_may_run_quack() -> bool:
    """Whether PyTorch (2.12 on) may replace its own kernels by the QuACK that it carries: where the
    packages that this needs are installed, and the switch against it is not set."""
    packages = all(importlib.util.find_spec(name) is not None for name in ("cutlass", "tvm_ffi"))
    return packages and os.environ.get("TORCH_DISABLE_NATIVE_JIT", "0") in ("", "0")


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _compiled() -> Norm:
    """Compiled afresh: after eight shapes torch.compile would fall to eager without a word."""
    torch.compiler.reset()
    return torch.compile(_torch, fullgraph=True)


def _liger(say: Callable[[str], None]) -> list[Contender]:
    try:
        released = importlib.import_module("liger_kernel.ops.rms_norm")
    except Exception as error:
        say(f"without Liger: {_reason(error)}")
        return []

    def norm(module: ModuleType, row_mode: bool | None = None) -> Norm:
        apply = module.LigerRMSNormFunction.apply
        return lambda x, weight: apply(x, weight, EPS, 0.0, "llama", True, row_mode)

    found = [
        Contender("liger", partial(norm, released), in_place=True),
        Contender("liger row", partial(norm, released, True), in_place=True, sibling=True),
    ]
    try:
        patched = with_source_rule(released)
    except ValueError as error:
        say(f"without Liger by the published rule: {error}")
        return found
    return [*found, Contender("liger source", partial(norm, patched), in_place=True, sibling=True)]


def with_source_rule(released: ModuleType) -> ModuleType:
    """A second copy of Liger's module, its two thresholds those of the published rule; the first
    stays as it is. Raises ValueError unless exactly two places change."""
    text = inspect.getsource(released)
    if (places := text.count(LIGER_CONDITION)) != 2:
        raise ValueError(f"its condition stands in {places} places of {released.__name__}, not 2")
    # A file, as Triton reads the source of what it compiles from one; only while it imports.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "liger_rms_norm_by_source_rule.py"
        path.write_text(text.replace(LIGER_CONDITION, SOURCE_CONDITION), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError("its copy cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _quack(say: Callable[[str], None]) -> list[Contender]:
    try:
        rmsnorm = importlib.import_module("quack").rmsnorm
    except Exception as error:
        say(f"without QuACK: {_reason(error)}")
        return []
    return [Contender("quack", lambda: lambda x, weight: rmsnorm(x, weight, eps=EPS))]


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
