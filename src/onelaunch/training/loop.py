"""The training loop: gradient accumulation, exact resume, measured telemetry.

One update is `accum` micro-steps, each the forward and backward of one batch, and one optimizer
step on their averaged gradient. Between updates come checkpoints and evaluations; an evaluation
follows a checkpoint, so that no training is lost if it fails. A run stops between micro-steps only:
it then saves the gradients so far.

The order of all batches is fixed by the recipe, and the gradient of each micro-step is scaled by
1/accum. So several processes can share the micro-steps of an update: each takes every n-th of them,
and gradients are summed before the optimizer step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.checkpoints.run_folder import prune_checkpoints, set_best
from onelaunch.engines.engine import TrainEngine
from onelaunch.errors import RunFailed
from onelaunch.training import state as saved
from onelaunch.training.clock import StepClock
from onelaunch.training.data import Sampler, TokenData
from onelaunch.training.display import Display
from onelaunch.training.evaluate import evaluate
from onelaunch.training.flops import training_flops
from onelaunch.training.metrics import MetricsWriter
from onelaunch.training.optim import Optimizer
from onelaunch.training.recipe import Recipe
from onelaunch.training.samples import draw_sample, encode_prompt
from onelaunch.training.signals import StopSignals
from onelaunch.training.state import Progress


@dataclass
class Outcome:
    """How `train` ended: finished, or stopped and saved, by a signal or to continue in a new
    process (`restart_requested`)."""

    recipe: Recipe
    run: Path
    progress: Progress
    signal: int | None = None
    restart_requested: bool = False


@dataclass
class Trainer:
    """One run in one process. `train()` is the loop, the other methods are its steps.

    `checkpoint` is the newest one; None at the start of a new run.
    """

    recipe: Recipe
    run: Path
    engine: TrainEngine
    data: TokenData
    sampler: Sampler
    optimizer: Optimizer
    metrics: MetricsWriter
    stop: StopSignals
    display: Display | None = None
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    seq_len: int = 0

    def __post_init__(self) -> None:
        self.parameters = self.engine.parameters()
        self.device = next(iter(self.parameters.values())).device
        self.seq_len = self.seq_len or self.recipe.train.seq_len or self.engine.config.max_seq_len
        dtype = self.engine.describe()["dtype"]
        self.flops = training_flops(self.engine.config, self.seq_len, self.device, dtype)
        self._clock = StepClock(self.device)
        self._loss_sum = torch.tensor(self.progress.loss_sum, device=self.device)
        at = (self.progress.update, self.progress.micro)
        self._saved_at = at if self.checkpoint is not None else None
        self._saved_time = time.monotonic()

    def train(self) -> Outcome:
        """Run to the recipe's last update, or to a stop signal."""
        progress, total = self.progress, self.recipe.train.updates
        self._clock.begin()
        while True:
            if progress.micro == 0:
                self._between_updates(last=progress.update >= total)
            if self.stop.received is not None or progress.update >= total:
                break
            if self.engine.restart_requested:
                break
            self._update()
        restart_requested = self.stop.received is None and progress.update < total
        if self.stop.received is not None or restart_requested:
            self._save()
        self._record({"kind": "end", "update": progress.update, "seconds": self._clock.end()})
        return Outcome(self.recipe, self.run, progress, self.stop.received, restart_requested)

    def _between_updates(self, last: bool) -> None:
        progress, recipe = self.progress, self.recipe
        at = progress.update

        def due(every: int) -> bool:
            return at > 0 and (last or (every > 0 and at % every == 0))

        if self.stop.received is not None:
            return
        evaluated_next = due(recipe.eval.every) and progress.evaluated < at
        minutes = (time.monotonic() - self._saved_time) / 60
        overdue = at > 0 and minutes >= recipe.checkpoint.minutes
        # a resume then needs no file of another model
        initial = at == 0 and self.checkpoint is None and recipe.train.init != ""
        if initial or due(recipe.checkpoint.every) or overdue or evaluated_next:
            before = self.checkpoint
            self._save(prune=not evaluated_next)
            if evaluated_next:
                self._evaluate(before)
                self._prune()

    def _update(self) -> None:
        """Micro-steps up to the update's last, or to a stop; then the optimizer step."""
        progress, accum = self.progress, self.recipe.train.accum
        started_at, tokens_before = progress.micro, progress.tokens
        while progress.micro < accum:
            self._micro_step()
            if self.stop.received is not None and progress.micro < accum:
                return
            self._save_if_overdue()
        lr = self.recipe.learning_rate(progress.update)
        self._clock.skip()
        norm = self._optimizer_step(lr)
        self.engine.after_update()
        # one wait for the device per update
        loss_sum, grad_norm = torch.stack((self._loss_sum, norm)).tolist()
        loss = loss_sum / accum
        self._clock.mark("optimizer")
        progress.update += 1
        progress.micro, progress.loss_sum = 0, 0.0
        self._loss_sum.zero_()
        seconds = self._clock.end()
        self._clock.begin()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.metrics.push({"kind": "diverged", "update": progress.update})
            raise self._diverged(loss, grad_norm, progress.update)
        record = {
            "kind": "update",
            "update": progress.update,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "micro_steps": accum,
            "tokens": progress.tokens,
            "seconds": seconds,
            "time": time.time(),
            **self.flops.rates(progress.tokens - tokens_before, seconds),
            **self.engine.telemetry(),
        }
        if started_at:
            # the earlier micro-steps were timed by the process that was stopped
            record["resumed_at_micro"] = started_at
        self._record(record)

    def _micro_step(self) -> None:
        progress, clock, recipe = self.progress, self._clock, self.recipe
        clock.skip()
        tokens_BS, targets_BS = self.sampler.next(recipe.train.batch_size)
        tokens = torch.from_numpy(tokens_BS).to(self.device, non_blocking=True)
        targets = torch.from_numpy(targets_BS).to(self.device, non_blocking=True)
        clock.mark("data")
        scale = 1.0 / recipe.train.accum
        loss = self.engine.train_step(tokens, targets, scale, clock.mark)
        self._loss_sum += loss
        clock.mark("forward")
        progress.micro += 1
        progress.tokens += tokens_BS.size
        if self.display is not None:
            self.display.progress(progress.update, progress.micro)

    def _optimizer_step(self, lr: float) -> Tensor:
        """Clip, step, zero; returns the norm of the averaged gradient, on the device."""
        clip = self.recipe.optimizer.grad_clip
        parameters = self.parameters.values()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _evaluate(self, before: Path | None) -> None:
        """Evaluate on the fixed batches, and write the loss into the current checkpoint.

        A checkpoint whose loss is not finite is deleted, unless it is the one from `before`.
        """
        progress, recipe = self.progress, self.recipe
        batches = self.data.eval_batches(
            "val", self.seq_len, recipe.train.batch_size, recipe.eval.batches
        )
        with self._timed("evaluation"):
            result = evaluate(self.engine, batches, stop=lambda: self.stop.received is not None)
        if not result.whole:
            return  # the resumed run does it again
        if not math.isfinite(result.loss):
            if self.checkpoint is not None and self.checkpoint != before:
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                self.checkpoint = before
            raise self._diverged(result.loss, None, progress.update)
        progress.evaluated, progress.val_loss = progress.update, result.loss
        is_best = progress.best_val_loss is None or result.loss < progress.best_val_loss
        if is_best:
            progress.best_update, progress.best_val_loss = progress.update, result.loss
        self._record(
            {
                "kind": "eval",
                "update": progress.update,
                "loss": result.loss,
                "tokens": result.tokens,
                "best": is_best,
            }
        )
        self._notice(f"update {progress.update}: validation loss {result.loss:.4f}")
        self._sample()
        assert self.checkpoint is not None
        with self._timed("checkpoint"):
            self.metrics.flush()
            saved.save_progress(self.checkpoint, progress)
            if is_best:
                set_best(self.run, self.checkpoint, progress.update, result.loss)

    def _sample(self) -> None:
        """Draw a text from the model and record it; none if a stop was requested."""
        wanted, tokenizer = self.recipe.eval, self.data.tokenizer
        prompt_ids = encode_prompt(wanted.prompt, tokenizer, self.engine.config)
        if not wanted.sample_tokens or not prompt_ids:
            return
        with self._timed("evaluation"):
            drawn = draw_sample(
                self.engine,
                tokenizer,
                prompt_ids,
                wanted.sample_tokens,
                stop=lambda: self.stop.received is not None,
            )
        if drawn is not None:
            text, n = drawn
            sample = {"prompt": wanted.prompt, "text": text, "tokens": n}
            self._record({"kind": "sample", "update": self.progress.update, **sample})

    def _save(self, prune: bool = True) -> None:
        """Write a checkpoint of the current state, once; earlier records are flushed first."""
        progress = self.progress
        at = (progress.update, progress.micro)
        with self._timed("checkpoint"):
            if self._saved_at != at:
                self.metrics.flush()
                progress.loss_sum = self._loss_sum.item()
                self._check_partial()
                self.checkpoint = saved.save(
                    self.run,
                    progress,
                    self.engine,
                    self.optimizer,
                    self.data,
                    self.sampler,
                    self.recipe.train.accum,
                )
        self._saved_at, self._saved_time = at, time.monotonic()
        if prune:
            self._prune()

    def _prune(self) -> None:
        with self._timed("checkpoint"):
            prune_checkpoints(self.run, self.recipe.checkpoint.keep)

    def _check_partial(self) -> None:
        """Raise RunFailed rather than save gradients that are not finite."""
        if not self.progress.micro:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not (math.isfinite(self.progress.loss_sum) and math.isfinite(norm)):
            self.metrics.push({"kind": "diverged", "update": self.progress.update + 1})
            raise self._diverged(self.progress.loss_sum, norm, self.progress.update + 1)

    def _save_if_overdue(self) -> None:
        """Save within an update of many micro-steps, after `checkpoint.minutes`."""
        unfinished = 0 < self.progress.micro < self.recipe.train.accum
        if (
            unfinished
            and time.monotonic() - self._saved_time >= self.recipe.checkpoint.minutes * 60
        ):
            self._save()

    def _diverged(self, loss: float, grad_norm: float | None, update: int) -> RunFailed:
        norm = "" if grad_norm is None else f", gradient norm {grad_norm}"
        saved_state = f"the last good checkpoint is {self.checkpoint}"
        if self.checkpoint is None:
            saved_state = "there is no checkpoint yet"
        return RunFailed(
            f"{self.run}: the loss is {loss}{norm} at update {update}; stopped; "
            f"{saved_state}; try a lower optimizer.lr or a longer optimizer.warmup"
        )

    def _record(self, record: dict[str, Any]) -> None:
        """Pass a record to the writer and the display, without waiting."""
        with self._timed("display"):
            self.metrics.push(record)
            if self.display is not None:
                self.display.progress(self.progress.update, self.progress.micro)
                self.display.push(record)
        if self.metrics.error is not None:
            raise self.metrics.error

    def _notice(self, text: str) -> None:
        if self.display is not None:
            self.display.notice(text)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the time of the block as one part; blocks do not nest."""
        self._clock.skip()
        yield
        self._clock.mark(part)
