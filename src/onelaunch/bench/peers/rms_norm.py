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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.errors import BadInput
from onelaunch.operators.rms_norm import launch, rms_norm

EPS = 1e-6

Norm = Callable[[Tensor, Tensor], Tensor]
Log = Callable[[str], None]

# What Liger requires before it takes its row path, and what the published rule requires.
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
    """`fresh()` returns the norm for one shape, made anew; `repeatable()`, where there is one, the
    norm whose graph can be walked backward many times. `form`: one of ours, no peer. `in_place`:
    writes dX over the incoming gradient. `sibling`: has the host path of another contender, and is
    not timed for its own."""

    name: str
    fresh: Callable[[], Norm]
    form: bool = False
    in_place: bool = False
    sibling: bool = False
    repeatable: Callable[[], Norm] | None = None


def ours() -> list[Contender]:
    """`ours`, by automatic choice; then with each path forced, and by the published rule."""
    return [
        Contender("ours", _ours(), form=True),
        Contender("row", _ours(row_mode="row"), form=True, sibling=True),
        Contender("block", _ours(row_mode="block"), form=True, sibling=True),
        Contender("source", _ours(rule="source"), form=True, sibling=True),
    ]


def source_paths() -> list[Contender]:
    """Ours as the published rule has it, 16 rows a tile and one row, at any number of rows."""
    return [
        Contender(f"source {mode}", _ours(rule="source", row_mode=mode), form=True, sibling=True)
        for mode in ("block", "row")
    ]


def ours_in_place() -> Contender:
    """Ours with dX written over the incoming gradient: what memory that saves."""
    return Contender("in place", _ours(in_place=True), form=True, in_place=True, sibling=True)


def _ours(**options: Any) -> Callable[[], Norm]:
    return lambda: lambda x, weight: rms_norm(x, weight, EPS, **options)


def has_kernel(device: torch.device, log: Log) -> bool:
    """Whether kernels are measured on a device; a line says so where none is. Raises BadInput where
    a kernel's time would mean nothing, or there is no kernel though there should be one."""
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
    with warnings.catch_warnings():  # instead of the operator's own warning, which comes once
        warnings.simplefilter("ignore")
        rms_norm(torch.ones(1, 1))
    log("there is no kernel on this device: ours is the plain PyTorch form")
    return False


def peers(device: torch.device, log: Log) -> list[Contender]:
    """Those that run on a device; a line names each that is missing."""
    on_any = [
        Contender("torch", lambda: _torch),
        Contender("torch.compile", _compiled, repeatable=_compiled_repeatable),
    ]
    if device.type != "cuda":
        return on_any
    liger = _liger(
        log,
        Liger("liger", sibling=False),
        Liger("liger row", row_mode=True),
        Liger("liger source", SOURCE_CONDITION),
    )
    return [*on_any, *liger, *_quack(log)]


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


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _torch_again(x: Tensor, weight: Tensor) -> Tensor:
    # torch.compile caches by code: a second function does not get `_torch`'s compiled form
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
        return nullcontext()  # a PyTorch without the setting; if it refuses, a line says so


def _compiled() -> Norm:
    """Compiled afresh: after eight shapes torch.compile would fall to eager without a word."""
    torch.compiler.reset()
    return torch.compile(_torch, fullgraph=True)


class Liger(NamedTuple):
    """A form of Liger's norm: another condition of its row path in place of its own, and whether
    that path is forced."""

    name: str
    condition: str = ""
    row_mode: bool | None = None
    sibling: bool = True


def liger_paths(log: Log) -> list[Contender]:
    """Liger's two paths as it has them, at any number of rows; a line says what is missing."""
    return _liger(log, Liger("liger block", BLOCK_CONDITION), Liger("liger row", row_mode=True))


def _liger(log: Log, *forms: Liger) -> list[Contender]:
    try:
        released = importlib.import_module("liger_kernel.ops.rms_norm")
    except Exception as error:
        log(f"without Liger: {in_a_line(error)}")
        return []
    contenders = []
    for form in forms:
        try:
            module = with_condition(released, form.condition) if form.condition else released
        except ValueError as error:
            log(f"without {form.name}: {error}")
            continue
        fresh = partial(_liger_norm, module, form.row_mode)
        contenders.append(Contender(form.name, fresh, in_place=True, sibling=form.sibling))
    return contenders


def _liger_norm(module: ModuleType, row_mode: bool | None) -> Norm:
    apply = module.LigerRMSNormFunction.apply
    return lambda x, weight: apply(x, weight, EPS, 0.0, "llama", True, row_mode)


def with_condition(released: ModuleType, condition: str) -> ModuleType:
    """A second copy of Liger's module with another condition of the row path; the first stays as it
    is. Raises ValueError unless exactly two places change."""
    text = inspect.getsource(released)
    if (places := text.count(LIGER_CONDITION)) != 2:
        raise ValueError(f"its condition is in {places} places of {released.__name__}, not 2")
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


def _quack(log: Log) -> list[Contender]:
    try:
        rmsnorm = importlib.import_module("quack").rmsnorm
    except Exception as error:
        log(f"without QuACK: {in_a_line(error)}")
        return []
    return [Contender("quack", lambda: lambda x, weight: rmsnorm(x, weight, eps=EPS))]
