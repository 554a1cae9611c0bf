"""RMSNorm as others have it, and ours in its forms: all as `norm(x, weight) -> y`.

A peer runs as its users get it. Liger is there three times: as released, with its row path forced,
and with the published block-row rule (Liger-Kernel#1238) in place of its own thresholds.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.errors import BadInput
from onelaunch.operators.rms_norm import launch, rms_norm

EPS = 1e-6

Norm = Callable[[Tensor, Tensor], Tensor]

# What Liger asks before it takes its row path, and what the published rule asks.
LIGER_CONDITION = "BLOCK_SIZE > 256 or n_rows < 4096 * 8 or row_mode"
SOURCE_CONDITION = "BLOCK_SIZE > 512 or n_rows < 4096 or row_mode"
# Its block path at every row count that is measured.
BLOCK_CONDITION = "BLOCK_SIZE > 512 or row_mode"

# With what PyTorch puts the QuACK that it carries in place of its own kernels: from which of its
# versions on, and the versions of nvidia-cutlass-dsl that it knows to work.
QUACK_IN_TORCH = (2, 12)
KNOWN_CUTLASS = ("4.4.1", "4.4.2", "4.5.2")


@dataclass(frozen=True)
class Contender:
    """`fresh()` gives the norm for one shape, made anew; `repeatable()`, where there is one, the
    norm whose graph can be walked backward many times. `form`: one of ours, no peer. `in_place`:
    writes dX over the incoming gradient. `sibling`: has the host path of another contender, and is
    not timed for its own."""

    name: str
    fresh: Callable[[], Norm]
    form: bool = False
    in_place: bool = False
    sibling: bool = False
    repeatable: Callable[[], Norm] | None = None

    def fresh_backward(self) -> Norm | None:
        """The norm for the backward pass alone, where it is not that of `fresh`."""
        return self.repeatable() if self.repeatable else None


def ours() -> list[Contender]:
    """`ours`, by automatic choice; then with each path forced, and by the published rule."""
    return [
        Contender("ours", lambda: _ours, form=True),
        Contender("row", _ours_as(row_mode="row"), form=True, sibling=True),
        Contender("block", _ours_as(row_mode="block"), form=True, sibling=True),
        Contender("source", _ours_as(rule="source"), form=True, sibling=True),
    ]


def source_paths() -> list[Contender]:
    """Ours as the published rule has it, 16 rows a tile and one row, at any number of rows."""
    return [
        Contender(f"source {mode}", _ours_as(rule="source", row_mode=mode), form=True, sibling=True)
        for mode in ("block", "row")
    ]


def _ours_as(**how: str) -> Callable[[], Norm]:
    return lambda: lambda x, weight: rms_norm(x, weight, EPS, **how)  # type: ignore[arg-type]


def ours_in_place() -> Contender:
    """Ours with dX written over the incoming gradient: what memory that saves."""
    return Contender(
        "in place",
        lambda: lambda x, weight: rms_norm(x, weight, EPS, in_place=True),
        form=True,
        in_place=True,
        sibling=True,
    )


def has_kernel(device: torch.device, say: Callable[[str], None]) -> bool:
    """Whether kernels are measured on a device; where none is, that is said. Raises BadInput where
    there are kernels of which a time would tell nothing, or none though there should be."""
    if launch.INTERPRETED:
        raise BadInput(
            "TRITON_INTERPRET is set: interpreted kernels are not worth timing; unset it"
        )
    if device.type == "cuda":
        if not launch.available(device):
            raise BadInput(f"device {device}: Triton is not installed, so ours has no kernel there")
        return True
    if launch.available(device):
        raise BadInput(f"device {device}: timing kernels needs CUDA's graphs and events; use cpu")
    without_kernel(say)
    return False


def without_kernel(say: Callable[[str], None]) -> None:
    """Say, instead of the operator's own warning, that the plain form runs here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rms_norm(torch.ones(1, 1))
    say("there is no kernel on this device: ours is the plain PyTorch form")


def peers(device: torch.device, say: Callable[[str], None]) -> list[Contender]:
    """Those that run on a device; what is missing is said."""
    found = [Contender("torch", lambda: _torch)]
    found.append(Contender("torch.compile", _compiled, repeatable=_compiled_repeatable))
    if device.type == "cuda":
        found += _liger(say) + _quack(say)
    return found


def torch_may_run_quack() -> bool:
    """Whether PyTorch may replace its own kernels by the QuACK that it carries: from 2.12 on, where
    the packages that this needs are there in versions that it knows, and no switch forbids it."""
    torch_version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if torch_version < QUACK_IN_TORCH or _switched_on("TORCH_DISABLE_NATIVE_JIT"):
        return False
    if any(importlib.util.find_spec(name) is None for name in ("cutlass", "tvm_ffi")):
        return False
    try:
        cutlass = metadata.version("nvidia-cutlass-dsl")
    except metadata.PackageNotFoundError:
        return False
    return cutlass in KNOWN_CUTLASS or _switched_on("TORCH_NATIVE_SKIP_VERSION_CHECK")


def _switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def _ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _torch_again(x: Tensor, weight: Tensor) -> Tensor:
    # torch.compile remembers by code: a second function, lest `_torch`'s compiled form be found
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _compiled_repeatable() -> Norm:
    """Compiled so that its backward pass can run again: by default it may write over what its
    forward pass kept, and refuses retain_graph."""
    compiled = torch.compile(_torch_again, fullgraph=True)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        with _without_donations():
            return compiled(x, weight)

    return norm


def _without_donations() -> AbstractContextManager[Any]:
    try:
        from torch._functorch import config

        return config.patch(donated_buffer=False)
    except (ImportError, AttributeError):
        return nullcontext()  # a PyTorch without the setting; if it refuses, that is said


def _compiled() -> Norm:
    """Compiled afresh: after eight shapes torch.compile would fall to eager without a word."""
    torch.compiler.reset()
    return torch.compile(_torch, fullgraph=True)


def liger_paths(say: Callable[[str], None]) -> list[Contender]:
    """Liger's two paths as it has them, at any number of rows; what is missing is said."""
    released = _import_liger(say)
    if released is None:
        return []
    try:
        by_blocks = with_source_rule(released, BLOCK_CONDITION)
    except ValueError as error:
        say(f"without Liger's two paths: {error}")
        return []
    return [
        Contender(name, partial(_liger_norm, module, row), in_place=True, sibling=True)
        for name, module, row in (("liger block", by_blocks, None), ("liger row", released, True))
    ]


def _import_liger(say: Callable[[str], None]) -> ModuleType | None:
    try:
        return importlib.import_module("liger_kernel.ops.rms_norm")
    except Exception as error:
        say(f"without Liger: {_reason(error)}")
        return None


def _liger_norm(module: ModuleType, row_mode: bool | None = None) -> Norm:
    apply = module.LigerRMSNormFunction.apply
    return lambda x, weight: apply(x, weight, EPS, 0.0, "llama", True, row_mode)


def _liger(say: Callable[[str], None]) -> list[Contender]:
    released = _import_liger(say)
    if released is None:
        return []
    found = [
        Contender("liger", partial(_liger_norm, released), in_place=True),
        Contender("liger row", partial(_liger_norm, released, True), in_place=True, sibling=True),
    ]
    try:
        patched = with_source_rule(released)
    except ValueError as error:
        say(f"without Liger by the published rule: {error}")
        return found
    source = Contender("liger source", partial(_liger_norm, patched), in_place=True, sibling=True)
    return [*found, source]


def with_source_rule(released: ModuleType, condition: str = SOURCE_CONDITION) -> ModuleType:
    """A second copy of Liger's module, its two thresholds those of the published rule, or of
    another `condition` of the row path; the first stays as it is. Raises ValueError unless exactly
    two places change."""
    text = inspect.getsource(released)
    if (places := text.count(LIGER_CONDITION)) != 2:
        raise ValueError(f"its condition stands in {places} places of {released.__name__}, not 2")
    # A file, as Triton reads the source of what it compiles from one; only while it imports.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "liger_rms_norm_by_source_rule.py"
        path.write_text(text.replace(LIGER_CONDITION, condition), encoding="utf-8")
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
