"""The CPU engine's training step: compiled forward and backward over PyTorch's own parameters."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_tokens, not_computed
from onelaunch.engines.cpu import program, usable_cores, why_not
from onelaunch.engines.cpu.program import TRAINING, TrainingProgram
from onelaunch.engines.cpu.training.batch import Batch
from onelaunch.engines.cpu.training.layout import Call, Kind, Step
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, EngineTimeout, RunFailed

MOST_BATCHES = 2  # shapes whose buffers are kept: that of training and of evaluation
WHAT = "the training step for this processor"


class CpuTrainer(ReferenceEngine):
    """Trains on the CPU in compiled code, float32; see `TrainEngine`.

    Logits are PyTorch's. The code is compiled once for each processor and kept; the constructor
    begins with it, and the first step waits for it, so that every step of a run is computed in one
    way. Gradients do not depend on the number of threads, which is PyTorch's or `threads`, and at
    most that of the usable cores. `log` gets lines for people. Raises BadInput for what cannot be
    had.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        threads: int | None = None,
        log: Callable[[str], None] = lambda line: None,
        store: Store | None = None,
    ) -> None:
        if reason := why_not() or not_computed(config):
            raise BadInput(f"engine='cpu': {reason}; use engine='reference'")
        super().__init__(config, weights, "cpu", "float32", threads, train=True)
        self._threads = min(torch.get_num_threads(), usable_cores())
        self._log = log
        self._program: TrainingProgram | None = None
        self._parameters = {name: p.detach() for name, p in self.parameters().items()}
        self._gradients = {name: torch.empty_like(p) for name, p in self._parameters.items()}
        self._batches: dict[tuple[int, int], Batch] = {}
        self._helpers: ThreadPoolExecutor | None = None
        self._pid = 0
        self._compilation: Compilation[TrainingProgram] = Compilation(
            store or Store(),
            program.key(TRAINING),
            program.compiler(TRAINING),
            TrainingProgram,
            lambda line: self._log(line),
            WHAT,
        )

    def log_to(self, log: Callable[[str], None]) -> None:
        """Send log lines to `log` from now on, from any thread."""
        self._log = log

    def train_step(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Mark = no_mark,
    ) -> Tensor:
        """Add `scale` times the mean loss's gradient to each `.grad`; see `TrainEngine`."""
        tokens_BS = self._checked(tokens_BS, targets_BS)
        if self._program is None:
            self.wait()
            mark("stall")
        fresh = self._adopt_gradients()
        count = int((targets_BS >= 0).sum())
        batch = self._batch(*tokens_BS.shape)
        weight = scale / count if count else 0.0
        batch.begin(tokens_BS, targets_BS, weight, fresh, True)
        self._run(batch)
        forward, loss, _ = batch.seconds()
        mark("forward", forward)
        mark("loss", loss)
        mark("backward")
        return (batch.loss_sum() / count).float()

    def loss_sum(self, tokens_BS: Tensor, targets_BS: Tensor) -> float:
        """The loss in nats, summed over the targets that are not -1; no gradient is touched."""
        tokens_BS = self._checked(tokens_BS, targets_BS)
        self.wait()
        batch = self._batch(*tokens_BS.shape)
        batch.begin(tokens_BS, targets_BS, 0.0, False, False)
        self._run(batch)
        return batch.loss_sum().item()

    def telemetry(self) -> dict[str, Any]:
        """`thread_seconds`: the seconds of all threads together on each kind of work."""
        total: dict[str, float] = dict.fromkeys((kind.name.lower() for kind in Kind), 0.0)
        for batch in self._batches.values():
            for kind, seconds in batch.take_spent().items():
                total[kind.name.lower()] += seconds
        return {"thread_seconds": total}

    def _checked(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        tokens_BS = check_tokens(self.config, tokens_BS)
        vocab = self.config.vocab_size
        if targets_BS.shape != tokens_BS.shape:
            raise BadInput(
                f"targets of shape {tuple(targets_BS.shape)}: must be as the tokens, "
                f"{tuple(tokens_BS.shape)}"
            )
        if not tokens_BS.numel():
            raise BadInput("there are no tokens: a batch has one sequence and one token at least")
        if not -1 <= int(targets_BS.min()) <= int(targets_BS.max()) < vocab:
            raise BadInput(f"a target is outside the model's vocabulary of {vocab}, and not -1")
        return tokens_BS

    def _adopt_gradients(self) -> bool:
        """Have each parameter's `.grad` be our own tensor; whether all of them are to be written,
        as there was none."""
        parameters = self.parameters()
        fresh = all(p.grad is None for p in parameters.values())
        for name, parameter in parameters.items():
            own = self._gradients[name]
            if parameter.grad is None:
                if not fresh or (name == "embed_tokens.weight" and not self.config.tied_embeddings):
                    own.zero_()
            elif parameter.grad.data_ptr() != own.data_ptr():
                own.copy_(parameter.grad)
            parameter.grad = own
        return fresh

    def _batch(self, sequences: int, length: int) -> Batch:
        key = sequences, length
        if key not in self._batches:
            assert self._program is not None
            while len(self._batches) >= MOST_BATCHES:
                del self._batches[next(iter(self._batches))]
            self._batches[key] = Batch(
                self.config,
                self._parameters,
                self._gradients,
                sequences,
                length,
                self._program.lanes,
                self._threads,
                _address_of("usleep"),
                _address_of("clock_gettime"),
            )
        return self._batches[key]

    def wait(self) -> None:
        """Until the code is compiled. Raises RunFailed where it cannot be."""
        if self._program is None:
            self._program = self._compilation.wait()
            if self._program is None:
                raise RunFailed(
                    f"{WHAT} could not be compiled ({self._compilation.failed}); "
                    "train with engine='reference'"
                )

    def _run(self, batch: Batch) -> None:
        assert self._program is not None
        call, state = self._program.call, batch.state.address
        helpers = self._threads - 1
        if helpers and (self._helpers is None or self._pid != os.getpid()):
            self._helpers = ThreadPoolExecutor(helpers, "onelaunch")
            self._pid = os.getpid()
        others = [
            self._helpers.submit(call, Call.RUN, state, i + 1, 0)
            for i in range(helpers)
            if self._helpers is not None
        ]
        done = [int(call(Call.RUN, state, 0, 0)), *(int(other.result()) for other in others)]
        if min(done) < batch.state[Step.N_PHASES]:
            raise EngineTimeout(
                f"a thread did not finish its part of phase {batch.state[Step.STUCK_PHASE]} of a "
                "training step; start again, with threads=1"
            )

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights, threads."""
        return {**super().describe(), "engine": "cpu", "threads": self._threads}

    def close(self) -> None:
        """End the threads."""
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None


def _address_of(name: str) -> int:
    """The address of a C function of this process."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
