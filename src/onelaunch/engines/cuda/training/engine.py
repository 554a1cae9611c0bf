"""The CUDA engine's training step: a few CUDA graphs over flat parameters."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_tokens
from onelaunch.engines.cuda import why_not_train
from onelaunch.engines.cuda.training.flat import FlatParameters
from onelaunch.engines.cuda.training.forms import has_own_attention
from onelaunch.engines.cuda.training.step import TrainingStep, forms_by_rule
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput
from onelaunch.operators.triton_cache import prepare_triton
from onelaunch.plan.training import RECOMPUTE, Recompute, make_training_plan

RESERVE = 1 << 30  # bytes of a GPU's memory for what no plan counts
MOST_SHAPES = 2  # whose buffers are kept: that of training and of evaluation


class CudaTrainer(ReferenceEngine):
    """Trains on an NVIDIA GPU; see `TrainEngine`. Weights and gradients are float32, products in
    `dtype`, bfloat16 by default, or float32, which is for checking.

    The second use of a batch's shape captures CUDA graphs of a micro-step; from then on the host
    launches one, or with a `mark` three. Gradients have the same bits from run to run. `dropout`
    acts in `train_step` only; the key of a micro-step's masks is drawn from PyTorch's generator of
    the CPU. `recompute` is what the backward computes again, by default as little as the memory
    allows that is free at a shape's first use, which changes no bit; where it is given there are
    fewer logits at once, too. Logits and samples are PyTorch's. `flat` are its parameters and
    gradients as one tensor each, for an update of all at once. Raises BadInput for what cannot be
    had.
    """

    steps_at_once = True

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: str = "auto",
        dtype: str | None = None,
        dropout: float = 0.0,
        recompute: Recompute | None = None,
    ) -> None:
        if reason := why_not_train(resolve_device(device), config, dropout):
            raise BadInput(f"engine='cuda': {reason}; use engine='reference'")
        if resolve_device(device).type == "cuda":
            # while CUDA starts and weights are copied
            threading.Thread(target=prepare_triton, name="onelaunch", daemon=True).start()
        super().__init__(config, weights, device, dtype, train=True)
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise BadInput(f"dtype={dtype!r}: the CUDA engine trains in bfloat16 or float32")
        if dropout and not has_own_attention(config, self.dtype):
            raise BadInput(
                f"dropout={dropout}: the CUDA engine has none for heads of {config.head_dim} in "
                "float32; use bfloat16 or engine='reference'"
            )
        self.dropout, self._recompute = dropout, recompute
        self._parameters = super().parameters()
        self.flat = FlatParameters(config, self._parameters, self.dtype)
        self._gradients = {name: self.flat.gradient(name) for name in self._parameters}
        self._steps: OrderedDict[tuple[int, int], TrainingStep] = OrderedDict()
        self._is_rounded = False  # the weights that products read are those of the parameters

    def parameters(self) -> dict[str, Tensor]:
        """The float32 tensors to be updated, by canonical name."""
        return self._parameters

    @torch.no_grad()
    def train_step(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Mark = no_mark,
    ) -> Tensor:
        """Add `scale` times the mean loss's gradient to each `.grad`; see `TrainEngine`. Ids and
        targets on a GPU are not looked at: one beyond the vocabulary reads and writes anything."""
        with self.flat.on_device():
            key = int(torch.randint(2**63 - 1, ())) if self.dropout else None
            step = self._loaded(tokens_BS, targets_BS, scale, key)
            fresh = self._adopt_gradients()
            try:
                loss = step.train(not fresh, mark)
            except BaseException:
                if fresh:  # or what was there before would count as gradients
                    for parameter in self._parameters.values():
                        parameter.grad = None
                raise
        return loss

    @torch.no_grad()
    def loss_sum(self, tokens_BS: Tensor, targets_BS: Tensor) -> float:
        """The loss in nats, summed over the targets that are not -1; no gradient is touched."""
        with self.flat.on_device():
            step = self._loaded(*self._padded(tokens_BS, targets_BS), 0.0)
            return step.loss_sum().item()

    def after_update(self) -> None:
        """The parameters have been changed: those that products read follow, where what changed
        them has not done that."""
        self._is_rounded, self.flat.is_rounded = self.flat.is_rounded, False

    def _loaded(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float,
        dropout_key: int | None = None,
    ) -> TrainingStep:
        if tokens_BS.device.type == "cpu":
            tokens_BS = check_tokens(self.config, tokens_BS)
        if targets_BS.shape != tokens_BS.shape or tokens_BS.dim() != 2 or not tokens_BS.numel():
            raise BadInput(
                f"tokens of shape {tuple(tokens_BS.shape)} and targets of {tuple(targets_BS.shape)}"
                ": must be alike, one sequence and one token at least"
            )
        if tokens_BS.shape[1] > self.config.max_seq_len:
            raise BadInput(
                f"{tokens_BS.shape[1]} positions: the model's context is {self.config.max_seq_len}"
            )
        self.flat.is_rounded = False  # of an update without `after_update`
        if not self._is_rounded:
            self.flat.refresh()
            self._is_rounded = True
        if targets_BS.device.type == "cpu":
            vocab = self.config.vocab_size
            if not -1 <= int(targets_BS.min()) <= int(targets_BS.max()) < vocab:
                raise BadInput(f"a target is outside the model's vocabulary of {vocab}, and not -1")
        sequences, length = tokens_BS.shape
        step = self._step(sequences, length)
        step.load(tokens_BS, targets_BS, scale, dropout_key)
        return step

    def _padded(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """A batch filled up to the smallest shape whose buffers are there, with targets of -1; as
        it is if there is none. The last batches of an evaluation are smaller than the others, and
        their own buffers and graphs would take the place of the training step's."""
        alike = targets_BS.shape == tokens_BS.shape and tokens_BS.dim() == 2
        if not alike or not tokens_BS.numel():
            return tokens_BS, targets_BS  # to be refused
        B, S = tokens_BS.shape
        larger = [(b, s) for b, s in self._steps if b >= B and s >= S]
        if not larger or (B, S) in larger:
            return tokens_BS, targets_BS
        b, s = min(larger, key=lambda each: each[0] * each[1])
        rest = (0, s - S, 0, b - B)
        return F.pad(tokens_BS, rest), F.pad(targets_BS, rest, value=-1)

    def _step(self, sequences: int, length: int) -> TrainingStep:
        key = sequences, length
        if key not in self._steps:
            while len(self._steps) >= MOST_SHAPES:
                self._steps.popitem(last=False)
            if self.device.type == "cuda":
                prepare_triton()
            recompute = self._recompute or self._least_recompute(sequences, length)
            # who asks for less memory gets less of both; by itself a step rounds the same always
            fewer_logits = self._recompute not in (None, RECOMPUTE[0])
            forms = forms_by_rule(self.config, self.flat, sequences, length, fewer_logits)
            self._steps[key] = TrainingStep(
                self.config, self.flat, sequences, length, self.dropout, recompute, forms
            )
        self._steps.move_to_end(key)
        return self._steps[key]

    def _least_recompute(self, sequences: int, length: int) -> Recompute:
        if self.device.type != "cuda":
            return RECOMPUTE[0]
        torch.cuda.empty_cache()  # what PyTorch holds in reserve is free
        free = torch.cuda.mem_get_info(self.device)[0] - RESERVE
        for recompute in RECOMPUTE[:-1]:
            plan = make_training_plan(
                self.config, sequences, length, self.dtype.itemsize, recompute
            )
            if plan.batch_bytes + plan.logits_bytes <= free:
                return recompute
        return RECOMPUTE[-1]

    def _adopt_gradients(self) -> bool:
        """Have each parameter's `.grad` be our own tensor; whether all of them are to be written,
        as there was none."""
        parameters = self._parameters
        fresh = all(p.grad is None for p in parameters.values())
        for name, parameter in parameters.items():
            own = self._gradients[name]
            if parameter.grad is None:
                if not fresh:
                    own.zero_()
            elif parameter.grad.data_ptr() != own.data_ptr():
                own.copy_(parameter.grad)
            parameter.grad = own
        return fresh

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights."""
        return {**super().describe(), "engine": "cuda"}

    def close(self) -> None:
        """Let go of the buffers."""
        self._steps.clear()
