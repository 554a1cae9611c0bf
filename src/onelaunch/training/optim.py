"""The named optimizers of a recipe, their state as named tensors, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.training.recipe import Recipe
from onelaunch.training.sections import OptimizerSection

if TYPE_CHECKING:
    from onelaunch.engines.cuda.training.flat import FlatParameters

# of a parameter, each of its shape and dtype
_ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
_MUON_MOMENTS = ("momentum_buffer",)
_STEP = "step"


class MuonAndAdamW:
    """Muon for some parameters and AdamW for the others, with the interface of one optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        self.param_groups: list[dict[str, Any]] = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)


@runtime_checkable
class FlatOptimizer(Protocol):
    """An optimizer that updates all parameters at once, and keeps its state as it likes. What it
    has in common with torch.optim.Optimizer means the same."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Tensor]]

    def step(self) -> None:
        """Update all parameters."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients."""

    def clip_and_step(self, clip: float) -> Tensor:
        """Clip the gradients to a norm, 0 for never, and update; returns their norm before."""

    def updates(self) -> Tensor:
        """How many there were."""

    def adopt(self) -> None:
        """Take over what was put into `state`."""


Optimizer = torch.optim.Optimizer | MuonAndAdamW | FlatOptimizer


def make_optimizer(
    parameters: Mapping[str, Tensor], recipe: Recipe, flat: FlatParameters | None = None
) -> Optimizer:
    """Make the optimizer that a recipe names; of parameters that lie in `flat`, one that updates
    all at once, where there is one.

    adamw: AdamW (arXiv 1711.05101), with weight decay on matrices only, fused if supported.
    muon: Muon (Keller Jordan, kellerjordan.github.io/posts/muon) for the matrices of the layers,
        AdamW for the embedding, the head and vectors. Muon's updates are scaled to the size of
        AdamW's (arXiv 2502.16982), so that both take the same rate.
    """
    o = recipe.optimizer
    if o.name == "adamw" and flat is not None:
        from onelaunch.engines.cuda.training.adamw import FlatAdamW  # imports Triton

        return FlatAdamW(dict(parameters), flat, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay)
    if o.name == "adamw":
        return _adamw(list(parameters.values()), o)
    of_muon = [p for name, p in parameters.items() if _is_for_muon(name, p.shape)]
    others = [p for name, p in parameters.items() if not _is_for_muon(name, p.shape)]
    muon = torch.optim.Muon(
        of_muon,
        lr=o.lr,
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, _adamw(others, o))


def _adamw(parameters: list[Tensor], o: OptimizerSection) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused)


def _is_for_muon(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("layers.") and len(shape) == 2


def clip_and_step(
    optimizer: Optimizer, parameters: Iterable[Tensor], lr: float, clip: float
) -> Tensor:
    """Clip the gradients to a norm, 0 for never, update all parameters at a learning rate, and
    remove the gradients. Returns their norm before, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, FlatOptimizer):
        norm = optimizer.clip_and_step(clip)
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def optimizer_name(optimizer: Optimizer) -> str:
    """The recipe's name of an optimizer."""
    return "muon" if isinstance(optimizer, MuonAndAdamW) else "adamw"


def state_bytes(name: str, config: ModelConfig) -> int:
    """Bytes of the state that a named optimizer keeps for a model, all of it float32."""
    n_floats = 0
    for parameter, shape in config.weight_shapes().items():
        by_muon = name == "muon" and _is_for_muon(parameter, shape)
        moments = _MUON_MOMENTS if by_muon else _ADAMW_MOMENTS
        n_floats += len(moments) * math.prod(shape)
    return 4 * n_floats


def state_tensors(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state by name: KIND.PARAMETER, such as exp_avg.norm.weight. Empty before a step."""
    tensors = {}
    for name, parameter, part in _with_owners(optimizer, parameters):
        slots = dict(part.state.get(parameter, {}))
        if slots and isinstance(part, FlatOptimizer):
            slots[_STEP] = part.updates()
        tensors.update({f"{kind}.{name}": slots[kind] for kind in _kinds(part) if kind in slots})
    return tensors


def load_state_tensors(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: Path,
) -> None:
    """Restore what `state_tensors` returned after at least one step. Raises BadInput, naming
    `source`, for a tensor that is missing or has the wrong shape."""
    for name, parameter, part in _with_owners(optimizer, parameters):
        slots = {}
        for kind in _kinds(part):
            key = f"{kind}.{name}"
            if key not in tensors:
                raise BadInput(f"{source}: the tensor {key} is missing")
            tensor = tensors[key]
            if tensor.shape != (() if kind == _STEP else parameter.shape):
                raise BadInput(f"{source}: {key} has the wrong shape")
            # PyTorch counts steps on the host, and in its fused form on the device
            on_host = kind == _STEP and not part.defaults.get("fused")
            slots[kind] = tensor if on_host else tensor.to(parameter.device)
        part.state[parameter] = slots
    for part in _parts(optimizer):
        if isinstance(part, FlatOptimizer):
            part.adopt()


def _parts(optimizer: Optimizer) -> tuple[torch.optim.Optimizer | FlatOptimizer, ...]:
    return optimizer.parts if isinstance(optimizer, MuonAndAdamW) else (optimizer,)


def _kinds(part: torch.optim.Optimizer | FlatOptimizer) -> tuple[str, ...]:
    return _MUON_MOMENTS if isinstance(part, torch.optim.Muon) else (*_ADAMW_MOMENTS, _STEP)


def _with_owners(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer | FlatOptimizer]]:
    """Yield each parameter with its name and what updates it."""
    parts = _parts(optimizer)
    owners = {p: part for part in parts for group in part.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        yield name, parameter, owners[parameter]
