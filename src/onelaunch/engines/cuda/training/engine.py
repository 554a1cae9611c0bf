"""The CUDA engine's training step: a few CUDA graphs over flat parameters."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_tokens
from onelaunch.engines.cuda import why_not_train
from onelaunch.engines.cuda.training.flat import FlatParameters
from onelaunch.engines.cuda.training.forms import TrainingForms, has_own_attention
from onelaunch.engines.cuda.training.step import Ready, TrainingStep, forms_by_rule
from onelaunch.engines.cuda.training.swiglu_launches import can_fuse
from onelaunch.engines.cuda.training.tuning.candidates import candidates
from onelaunch.engines.cuda.training.tuning.search import Progress, search, shown
from onelaunch.engines.cuda.training.tuning.store import (
    TunedForms,
    data_of,
    facts_of,
    find,
    keep,
    read_forms,
)
from onelaunch.engines.cuda.tuning.facts import Facts, device_facts
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput
from onelaunch.operators.triton_cache import prepare_triton
from onelaunch.plan.training import FEWER_LOGITS, RECOMPUTE, Recompute, make_training_plan

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

    The forms of a shape's steps are those of a checkpoint (`use_forms`), else those that `tune`
    found and `store` keeps, else the rule's. Other forms round otherwise.
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
        store: Store | None = None,
    ) -> None:
        if reason := why_not_train(resolve_device(device), config):
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
        self.on_gradients: Ready | None = None
        """Called in each `train_step` as parts of the flat gradients are final."""
        self._store = store or Store()
        self._forms: dict[tuple[int, int], tuple[str, TrainingForms]] = {}
        """By sequences and length, with where they are from, "rule" or "tuned"."""
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
                loss = step.train(not fresh, mark, self.on_gradients)
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

    def telemetry(self) -> dict[str, Any]:
        """`kind_seconds`: of the last micro-step whose parts were requested and measured, what each
        kind of work took; once."""
        for step in self._steps.values():
            if seconds := step.kind_seconds():
                return {"kind_seconds": seconds}
        return {}

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
            _, forms = self._choose(sequences, length)
            self._steps[key] = self._make_step(sequences, length, forms)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _make_step(self, sequences: int, length: int, forms: TrainingForms) -> TrainingStep:
        recompute = self._recompute or self._least_recompute(sequences, length, forms.logits)
        return TrainingStep(
            self.config, self.flat, sequences, length, self.dropout, recompute, forms
        )

    def _choose(self, sequences: int, length: int) -> tuple[str, TrainingForms]:
        """The forms of a shape, and where they are from."""
        key = sequences, length
        if key not in self._forms:
            tuned = find(self._store, self._facts(sequences, length))
            forms = tuned.forms if tuned else self._rule(sequences, length)
            self._forms[key] = "tuned" if tuned else "rule", forms
        source, forms = self._forms[key]
        # who asks for less memory gets fewer logits too; by itself a step rounds the same always
        if self._recompute not in (None, RECOMPUTE[0]):
            forms = replace(forms, logits=min(forms.logits, FEWER_LOGITS))
        return source, forms

    def _rule(self, sequences: int, length: int) -> TrainingForms:
        return forms_by_rule(self.config, self.flat, sequences, length)

    def _facts(self, sequences: int, length: int) -> Facts:
        device = device_facts(self.device)
        return facts_of(self.config, sequences, length, self._dtype_name, self.dropout > 0, device)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def forms(self, sequences: int, length: int) -> dict[str, Any]:
        """The forms of a micro-step of so many sequences of `length` tokens, as JSON data: `source`
        is "rule" or "tuned"; `device` and `dtype` are what they hold for."""
        source, forms = self._choose(sequences, length)
        return {
            "source": source,
            "device": device_facts(self.device)["device"],
            "dtype": self._dtype_name,
            **data_of(forms),
        }

    def use_forms(self, saved: Any) -> bool:
        """Take the forms of `describe()["forms"]` for their shapes, before the first step of these,
        so that a resumed run rounds as before. Returns whether all of them can be used here."""
        found = {}
        try:
            for name, data in saved.items():
                sequences, length = map(int, name.split("x"))
                here = self.forms(sequences, length)
                own = {key: data[key] for key in data.keys() - {"source", "device", "dtype"}}
                forms = read_forms(own)
                if any(data[key] != here[key] for key in ("device", "dtype")):
                    return False
                if (forms.attention_forward is None) != (here["attention_forward"] is None):
                    return False
                found[sequences, length] = str(data["source"]), forms
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        self._forms |= found
        return True

    @torch.no_grad()
    def tune(
        self, sequences: int, length: int, progress: Progress = lambda phase, done, total: None
    ) -> dict[str, Any]:
        """Time micro-steps of a shape in several forms on this GPU and keep the fastest in the
        store; they are this engine's from now on, too. Gradients that are there are lost.

        Nothing else may use the GPU meanwhile. `progress` is called with a phase, how much of it is
        done, and of how much. Returns batch and sequence, the `forms`, microseconds of a micro-step
        in them (`us`) and in the rule's (`rule_us`), what was `timed`, how many that were, the
        seconds that it took, and whether the store has `kept` them. Raises BadInput for a shape
        that cannot be, and RunFailed where nothing runs.
        """
        from onelaunch.engines.cuda.training.tuning.timer import Timer

        began, c = time.monotonic(), self.config
        if sequences < 1 or not 1 <= length <= c.max_seq_len:
            raise BadInput(
                f"{sequences}x{length}: a step has one sequence or more, of 1 to {c.max_seq_len} "
                "tokens"
            )
        self._steps.clear()
        for parameter in self._parameters.values():
            parameter.grad = None
        fuses = can_fuse(self.flat.half_M, c.dim, c.hidden_dim)
        by_rule = self._rule(sequences, length)
        with self.flat.on_device():
            if self.device.type == "cuda":
                prepare_triton()
            step = self._make_step(sequences, length, by_rule)
            self.flat.refresh()
            tokens_BS, targets_BS = torch.randint(c.vocab_size, (2, sequences, length)).unbind()
            step.load(tokens_BS, targets_BS, 1.0, 1 if self.dropout else None)
            found = search(
                by_rule,
                candidates(c, sequences, length, self.dtype, fuses),
                Timer(step, self.flat.gradients_M),
                progress,
            )
        tuned = TunedForms(
            found.forms,
            round(found.us, 2),
            round(found.rule_us, 2),
            len(found.timed),
            round(time.monotonic() - began, 2),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        kept = keep(self._store, self._facts(sequences, length), tuned)
        self._forms[sequences, length] = "tuned", found.forms
        return {
            "batch": sequences,
            "sequence": length,
            "forms": data_of(found.forms),
            "us": tuned.us,
            "rule_us": tuned.rule_us,
            "timed": [
                {
                    "form": each.form,
                    "value": shown(each.value),
                    "us": each.us and round(each.us, 2),
                    "why": each.why,
                    "chosen": getattr(found.forms, each.form) == each.value,
                }
                for each in found.timed
            ],
            "tried": tuned.tried,
            "seconds": tuned.seconds,
            "kept": kept,
        }

    def _least_recompute(self, sequences: int, length: int, logits: int) -> Recompute:
        if self.device.type != "cuda":
            return RECOMPUTE[0]
        torch.cuda.empty_cache()  # what PyTorch holds in reserve is free
        free = torch.cuda.mem_get_info(self.device)[0] - RESERVE
        for recompute in RECOMPUTE[:-1]:
            plan = make_training_plan(
                self.config, sequences, length, self.dtype.itemsize, recompute, logits
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
        """Engine, device, dtype, bytes of weights, and of each shape in use, such as "64x256", its
        forms."""
        forms = {"{}x{}".format(*shape): self.forms(*shape) for shape in self._forms}
        return {**super().describe(), "engine": "cuda", "forms": forms}

    def close(self) -> None:
        """Let go of the buffers."""
        self._steps.clear()
