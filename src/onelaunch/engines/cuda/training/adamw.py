"""AdamW over flat parameters: the norm of all gradients, clipping and the update, two launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onelaunch.engines.cuda.training import launches
from onelaunch.engines.cuda.training.flat import FlatParameters

SQUARES_CTAS = 1056
"""Of the gradients' norm."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW:
    """torch.optim.AdamW, with weight decay on matrices only, and clip_grad_norm_ in the same two
    launches; and the rounded weights that products read. Rate, betas and decay are those of the
    first group. `state` has the moments, from the first update on; `updates` counts those. State
    that is put there counts after `adopt`.

    It is no torch.optim.Optimizer: making one imports torch._dynamo, which takes 1 to 2 s.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        flat: FlatParameters,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True,
        }  # fmt: skip
        matrices = [p for p in parameters.values() if p.dim() > 1]
        vectors = [p for p in parameters.values() if p.dim() == 1]
        self.param_groups: list[dict[str, Any]] = [
            {**self.defaults, "params": matrices},
            {**self.defaults, "params": vectors, "weight_decay": 0.0},
        ]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._parameters, self._flat, self._updates = parameters, flat, 0
        self._gradients = [(p, flat.gradient(name)) for name, p in parameters.items()]
        self._moments = [torch.zeros_like(flat.weights_M) for _ in MOMENTS]
        device = flat.weights_M.device
        self._partial_P = torch.zeros(SQUARES_CTAS, device=device)
        self._numbers_8, self._norm = torch.zeros(8, device=device), torch.zeros(1, device=device)
        self._pinned = [torch.zeros(8, pin_memory=device.type == "cuda") for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if device.type == "cuda" else []
        self._launched = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        """Update without clipping."""
        self.clip_and_step(0.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove all gradients, or fill them with zeros."""
        for parameter in self._parameters.values():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def clip_and_step(self, clip: float) -> Tensor:
        """Scale the gradients down to the norm `clip` where theirs is larger, 0 for never, and
        update. Gradients that lie elsewhere, such as sums over several processes, are copied.
        Returns their norm as a scalar on the device."""
        with self._flat.on_device():
            return self._clip_and_step(clip)

    def _clip_and_step(self, clip: float) -> Tensor:
        for parameter, own in self._gradients:
            gradient = parameter.grad
            if gradient is own:
                continue
            if gradient is None:
                own.zero_()
            elif gradient.data_ptr() != own.data_ptr():
                own.copy_(gradient)
        self._updates += 1
        decayed = self.param_groups[0]
        numbers = launches.adamw_numbers(
            float(decayed["lr"]), decayed["betas"], decayed["eps"], decayed["weight_decay"],
            self._updates, clip if math.isfinite(clip) else 0.0,
        )  # fmt: skip
        self._give(numbers)
        self._run()
        if not self.state:
            self._show_state()
        self._flat.is_rounded = True
        return self._norm[0].clone()

    def adopt(self) -> None:
        """Take over the moments and the count of updates that were put into `state`."""
        for name, parameter in self._parameters.items():
            slots = self.state[parameter]
            for kind, flat_M in zip(MOMENTS, self._moments, strict=True):
                self._flat.view(flat_M, name).copy_(slots[kind])
            self._updates = int(slots["step"])
        self._show_state()

    def _show_state(self) -> None:
        for name, parameter in self._parameters.items():
            self.state[parameter] = {
                kind: self._flat.view(flat_M, name)
                for kind, flat_M in zip(MOMENTS, self._moments, strict=True)
            }

    def updates(self) -> Tensor:
        """How many there were, as a scalar, float32."""
        return torch.tensor(float(self._updates))

    def _give(self, numbers: list[float]) -> None:
        """To the device, from memory that the update before the last one had."""
        self._pinned.reverse()
        self._copied.reverse()
        if self._copied:
            self._copied[0].synchronize()  # at once where it has not been recorded
        self._pinned[0].copy_(torch.tensor(numbers))
        self._numbers_8.copy_(self._pinned[0], non_blocking=True)
        if self._copied:
            self._copied[0].record()

    def _run(self) -> None:
        """Launched at its first use, captured at its second, and replayed."""
        if not self._launched or self._flat.weights_M.device.type != "cuda":
            self._launch()  # loads its kernels, which no capture may see
            self._launched = True
            return
        if self._graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch()
            self._graph = graph
        self._graph.replay()

    def _launch(self) -> None:
        flat = self._flat
        half = None if flat.half_M is flat.weights_M else flat.half_M
        launches.sum_of_squares(flat.gradients_M, self._partial_P)
        launches.adamw(
            flat.weights_M, flat.gradients_M, self._moments[0], self._moments[1], half,
            self._partial_P, self._numbers_8, flat.n_decayed, self._norm,
        )  # fmt: skip
