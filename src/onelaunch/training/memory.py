"""Check that a run fits in memory: a lower bound of its use, and the available bytes.

A run that is refused cannot fit. Others may still run out of memory; `explain_out_of_memory` then
names `train.batch_size`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput, RunFailed, is_out_of_memory
from onelaunch.plan import make_training_plan
from onelaunch.plan.training import FEWER_LOGITS, LOGITS, RECOMPUTE
from onelaunch.training.engines import engine_name
from onelaunch.training.optim import state_bytes
from onelaunch.training.recipe import Recipe


@dataclass(frozen=True)
class MemoryEstimate:
    """A lower bound of the bytes that a training step uses at once.

    `fixed` is for any batch: float32 weights and the optimizer's state. `gradients` add to it at
    the optimizer step, and in the backward pass if they stay between micro-steps
    (`gradients_stay`). `sequence` are the bytes per sequence in the backward pass.
    """

    fixed: int
    gradients: int
    sequence: int
    batch_size: int
    gradients_stay: bool

    @property
    def total(self) -> int:
        """The larger of two peaks: at the optimizer step, and at the start of the backward pass."""
        backward = self.fixed + self.batch_size * self.sequence
        backward += self.gradients if self.gradients_stay else 0
        return max(self.fixed + self.gradients, backward)

    def largest_batch(self, available: int) -> int:
        """Return the largest batch that may fit in `available` bytes; 0 if none does."""
        left = available - self.fixed - (self.gradients if self.gradients_stay else 0)
        return max(0, left) // max(1, self.sequence)


def estimate(recipe: Recipe, config: ModelConfig, seq_len: int, autocast: bool) -> MemoryEstimate:
    """Estimate the memory of a step. `autocast` is whether it computes in bfloat16.

    For its backward a layer saves, per position: the inputs (float32, the residual stream) and
    outputs of both norms, q, k, v and the output of attention, gate, up, silu(gate) and their
    product. The logits have three float32 copies at the start of the backward: log-probabilities,
    and the gradients of the log-probabilities and of the logits. torch.compile recomputes
    elementwise values and writes the gradient of the logits in place. The CPU engine keeps the
    residual stream twice a layer, q, k, v, the output of attention, gate and up. The CUDA engine's
    are those of its plan that computes the most again, or of `train.recompute`.

    It is 0.87 to 0.995 of the peaks of 14 eager runs on an H200 (torch 2.11; stories260k to four
    layers of llama-3.2-1b, 64 to 32,768 tokens), except where attention saves its scores (0.19);
    0.57 to 0.83 of five compiled ones; 0.62 to 0.77 of three on a CPU; 0.97 and 0.98 of two of the
    CUDA engine's.
    """
    c, parameters = config, config.n_params
    item = 2 if autocast else 4
    attention = 2 * c.q_dim + 2 * c.kv_dim
    if recipe.train.compile:
        layer = item * (c.dim + attention + 2 * c.hidden_dim)
        logits = item * c.vocab_size
    else:
        layer = 2 * 4 * c.dim + item * (2 * c.dim + attention + 4 * c.hidden_dim)
        logits = 3 * 4 * c.vocab_size
    position = c.n_layers * layer + logits
    name = engine_name(recipe, config)
    if name == "coreml":
        position = 0  # its layers run in another process, in another precision
    if name == "cpu":  # it keeps no more than some megabytes of logits
        position = c.n_layers * 4 * (2 * c.dim + attention + 2 * c.hidden_dim)
    of_weights, once_more = 4, 0
    if name == "cuda":  # some logits, and weights once more in the dtype of products
        # with auto, as much is computed again as there must be
        requested = next((each for each in RECOMPUTE if each == recipe.train.recompute), None)
        logits = LOGITS if requested in (None, RECOMPUTE[0]) else FEWER_LOGITS
        batch = recipe.train.batch_size
        plan = make_training_plan(c, batch, seq_len, item, requested or RECOMPUTE[-1], logits)
        once_more, of_weights = plan.logits_bytes, 4 + item
        position = plan.batch_bytes // (recipe.train.batch_size * seq_len)
    return MemoryEstimate(
        fixed=once_more + of_weights * parameters + state_bytes(recipe.optimizer.name, config),
        gradients=4 * parameters,
        sequence=seq_len * position,
        batch_size=recipe.train.batch_size,
        gradients_stay=recipe.train.accum > 1 or name in ("cpu", "cuda"),
    )


class Fit(NamedTuple):
    """What a run needs and what is `available`, in bytes (None if unknown). `misfit` says why it
    cannot fit and names the field to change; None if it may fit."""

    needed: MemoryEstimate
    available: int | None
    misfit: str | None


def fit_in_memory(recipe: Recipe, config: ModelConfig, seq_len: int, device: torch.device) -> Fit:
    """Compare what a run needs with the memory of a device."""
    available = available_bytes(device)
    autocast = device.type == "cuda" if recipe.train.dtype == "auto" else False
    autocast = autocast or recipe.train.dtype == "bfloat16"
    needed = estimate(recipe, config, seq_len, autocast)
    if available is None or needed.total <= available:
        return Fit(needed, available, None)
    batch, fits = needed.batch_size, needed.largest_batch(available)
    if needed.fixed + needed.gradients > available:
        change = "train a smaller model ([model])"
    elif fits:
        change = f"set train.batch_size to {fits} or less"
    else:
        change = "set train.batch_size to 1 and lower train.seq_len"
    misfit = (
        f"the run needs at least {format_bytes(needed.total)} of memory "
        f"({format_bytes(needed.fixed + needed.gradients)} for the weights, their gradients and "
        f"the optimizer's state, {format_bytes(batch * needed.sequence)} for a batch of {batch} x "
        f"{seq_len}) and {device} has {format_bytes(available)} free: {change}"
    )
    return Fit(needed, available, misfit)


def check_fits(recipe: Recipe, config: ModelConfig, seq_len: int, device: torch.device) -> None:
    """Raise BadInput, naming the field to change, if a run cannot fit in the memory of a device."""
    misfit = fit_in_memory(recipe, config, seq_len, device).misfit
    if misfit is not None:
        raise BadInput(misfit)


def format_bytes(n_bytes: int) -> str:
    """Format bytes, as in "1.23 GB"."""
    unit, size = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)
    return f"{n_bytes / size:.3g} {unit}"


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None if unknown.

    On a CPU: available memory and swap, or the rest of the limit of the control group if that is
    less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    limits = [_system_bytes(), *_group_bytes()]
    return min((limit for limit in limits if limit is not None), default=None)


def _system_bytes() -> int | None:
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))
    with suppress(OSError, ValueError, AttributeError):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Return the remaining bytes of each control group of this process, and of their parents."""
    remaining = []
    with suppress(OSError, ValueError):
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, names = mount, ("memory.max", "memory.current", "file")
            elif "memory" in controllers.split(","):
                top = mount / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            else:
                continue
            inner = top / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if (left := _remaining(folder, *names)) is not None:
                    remaining.append(left)
                if folder == top:
                    break
    return remaining


def _remaining(folder: Path, limit: str, usage: str, cached: str) -> int | None:
    with suppress(OSError, ValueError, KeyError):
        maximum = int((folder / limit).read_text())  # "max" is no number: no limit
        lines = (folder / "memory.stat").read_text().splitlines()
        statistics = dict(line.split() for line in lines)
        return max(0, maximum - int((folder / usage).read_text()) + int(statistics[cached]))
    return None


@contextmanager
def explain_out_of_memory(recipe: Recipe, run: Path | None = None) -> Iterator[None]:
    """Turn an out-of-memory error into RunFailed with the field to change and, for an existing
    `run`, how to resume it from its newest checkpoint."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        batch = recipe.train.batch_size
        if batch == 1:
            change = "lower train.seq_len, as train.batch_size is 1, or train a smaller model"
        elif run is None:
            change = f"lower train.batch_size, which is {batch}"
        else:
            kept = list_checkpoints(run)
            start = f" from {kept[-1].name}" if kept else ""
            change = (
                f"lower train.batch_size, which is {batch}: continue{start} with resume=True, "
                f"run={str(run)!r} and train.batch_size={batch // 2}"
            )
        where = f"{run}: " if run else ""
        raise RunFailed(f"{where}not enough memory: {change}") from error
