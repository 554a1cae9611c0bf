"""The training loop: gradient accumulation, exact resume, measured telemetry.

One update is `accum` micro-steps, each the forward and backward of one batch, and one optimizer
step on their averaged gradient. Between updates come checkpoints and evaluations; an evaluation
follows a checkpoint, so that no training is lost if it fails. A run stops between micro-steps only:
it then saves the gradients so far.

The order of all batches is fixed by the recipe. Several processes (ranks.py) share the micro-steps
of an update, which then are `accum` for each of n ranks: rank r takes the r-th of every n. Each
micro-step's gradient is scaled by 1 / (n * accum), and gradients are summed over the ranks before
the optimizer step, which all take alike. So n ranks compute what one process does with n times the
micro-steps. What depends on time or on signals is agreed with each update, and within an update
about once in a second.

On a GPU an update's figures are read when the next one has been launched, so that the device waits
for the host in neither.
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.checkpoints.run_folder import prune_checkpoints, set_best
from onelaunch.engines.engine import TrainEngine, no_mark
from onelaunch.errors import RunFailed
from onelaunch.training import state as saved
from onelaunch.training.batches import Batch
from onelaunch.training.buckets import FlatBuckets, FlatEngine, GradientBuckets
from onelaunch.training.clock import REDUCE, StepClock
from onelaunch.training.data import Sampler, TokenData
from onelaunch.training.display import Display
from onelaunch.training.evaluate import evaluate
from onelaunch.training.flops import training_flops
from onelaunch.training.metrics import MetricsWriter
from onelaunch.training.optim import Optimizer, clip_and_step
from onelaunch.training.pending import PendingUpdate, to_device, to_host
from onelaunch.training.ranks import ALONE, DECISION_NUMBERS, Decision, Ranks, decision_of
from onelaunch.training.recipe import MAX_ACCUM, Recipe
from onelaunch.training.samples import draw_sample, encode_prompt
from onelaunch.training.shuffle import mix64
from onelaunch.training.signals import StopSignals
from onelaunch.training.state import Progress

AGREEMENT_SECONDS = 1.0
"""About how often ranks agree within an update."""


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

    `checkpoint` is the newest one; None at the start of a new run. Only the rank that writes has
    `metrics`.
    """

    recipe: Recipe
    run: Path
    engine: TrainEngine
    data: TokenData
    sampler: Sampler
    optimizer: Optimizer
    metrics: MetricsWriter | None
    stop: StopSignals
    display: Display | None = None
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    seq_len: int = 0
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.parameters = self.engine.parameters()
        self.device = next(iter(self.parameters.values())).device
        self.seq_len = self.seq_len or self.recipe.train.seq_len or self.engine.config.max_seq_len
        dtype = self.engine.describe()["dtype"]
        self.flops = training_flops(
            self.engine.config, self.seq_len, self.device, dtype, self.ranks.size
        )
        self._clock = StepClock(self.device)
        self._loss_sum = torch.tensor(self.progress.loss_sum, device=self.device)
        at = (self.progress.update, self.progress.micro)
        self._saved_at = at if self.checkpoint is not None else None
        self._saved_time = time.monotonic()
        self._agreed = Decision()
        self._micro_seconds = math.inf
        self._pending: PendingUpdate | None = None
        # several ranks decide by what is known of the last update
        self._reads_late = self.device.type == "cuda" and self.ranks.size == 1
        self._buckets: FlatBuckets | GradientBuckets | None = None
        if self.ranks.size > 1:
            self._buckets = self._make_buckets(1 + DECISION_NUMBERS)

    def _make_buckets(self, n_numbers: int) -> FlatBuckets | GradientBuckets:
        if isinstance(self.engine, FlatEngine) and self.engine.flat is not None:
            return FlatBuckets(self.engine, n_numbers)
        return GradientBuckets(list(self.parameters.values()), n_numbers)

    def train(self) -> Outcome:
        """Run to the recipe's last update, or to a stop signal."""
        # what is there now stays: no collection between updates needs to look through it
        gc.collect()
        gc.freeze()
        try:
            return self._train()
        except Exception:
            with suppress(Exception):
                self._settle_all()  # an update that is done is not lost
            raise
        finally:
            gc.unfreeze()
            if self._buckets is not None:
                self._buckets.close()

    def _train(self) -> Outcome:
        progress, total = self.progress, self.recipe.train.updates
        self._clock.begin(self._in_parts())
        self._agree()
        while True:
            if progress.micro == 0:
                self._between_updates(last=progress.update >= total)
            if self._decision.signal is not None or progress.update >= total:
                break
            if self.engine.restart_requested:
                break
            self._update()
        self._settle_all()
        signal = self._decision.signal
        restart_requested = signal is None and progress.update < total
        if signal is not None or restart_requested:
            self._save()
        self._record({"kind": "end", "update": progress.update, "seconds": self._clock.end()})
        return Outcome(self.recipe, self.run, progress, signal, restart_requested)

    @property
    def _decision(self) -> Decision:
        """What several ranks agreed last; for one process, what it finds now."""
        return self._proposal() if self.ranks.size == 1 else self._agreed

    def _proposal(self) -> Decision:
        seconds = time.monotonic() - self._saved_time
        interval = min(MAX_ACCUM, max(1, int(AGREEMENT_SECONDS / self._micro_seconds)))
        return Decision(
            self.stop.received, seconds >= self.recipe.checkpoint.minutes * 60, interval
        )

    def _agree(self) -> None:
        self._agreed = self.ranks.agree(self._proposal())

    def _between_updates(self, last: bool) -> None:
        progress, recipe = self.progress, self.recipe
        at = progress.update

        def due(every: int) -> bool:
            return at > 0 and (last or (every > 0 and at % every == 0))

        decision = self._decision
        if decision.signal is not None:
            return
        evaluated_next = due(recipe.eval.every) and progress.evaluated < at
        overdue = at > 0 and decision.save
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
            if progress.micro < accum:
                if self.ranks.size > 1 and progress.micro % self._agreed.interval == 0:
                    self._agree()
                if self._decision.signal is not None:
                    return
            self._save_if_overdue()
        lr = self.recipe.learning_rate(progress.update, self.ranks.size)
        sums = self._sum_over_ranks()
        self._clock.skip()
        norm = self._optimizer_step(lr)
        self.engine.after_update()
        values = torch.cat((sums, norm[None]))
        self._clock.mark("optimizer")
        progress.update += 1
        progress.micro, progress.loss_sum = 0, 0.0
        self._loss_sum.zero_()
        record = {
            "kind": "update",
            "update": progress.update,
            "lr": lr,
            "micro_steps": self.ranks.size * accum,
            "tokens": progress.tokens,
            "time": time.time(),
        }
        if started_at:
            # the earlier micro-steps were timed by the process that was stopped
            record["resumed_at_micro"] = started_at
        before, self._pending = (
            self._pending,
            PendingUpdate(
                record, to_host(values), self._clock.end_later(), accum - started_at,
                progress.tokens - tokens_before,
            ),
        )  # fmt: skip
        self._clock.begin(self._in_parts())
        if before is not None:
            self._settle(before)
        if not self._reads_late:
            self._settle_all()

    def _settle_all(self) -> None:
        """Wait for the update that is under way on the device, if one is, and record it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._settle(pending)

    def _settle(self, pending: PendingUpdate) -> None:
        """Wait for an update's figures, and record it. Raises RunFailed for ones that are not
        finite."""
        values, arrived = pending.values
        if arrived is not None:
            arrived.synchronize()
        loss_sum, *agreed, grad_norm = values.tolist()
        if agreed:
            self._agreed = decision_of(agreed)
        record, seconds = pending.record, pending.seconds()
        loss = loss_sum / record["micro_steps"]
        self._micro_seconds = seconds["wall"] / pending.micro_steps
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._pending = None
            self._push({"kind": "diverged", "update": record["update"]})
            raise self._diverged(loss, grad_norm, record["update"])
        self._record(
            {
                "kind": record.pop("kind"),
                "update": record.pop("update"),
                "loss": loss,
                "lr": record.pop("lr"),
                "grad_norm": grad_norm,
                "micro_steps": record.pop("micro_steps"),
                "tokens": record.pop("tokens"),
                "seconds": seconds,
                "time": record.pop("time"),
                **self.flops.rates(pending.tokens, seconds),
                **self.engine.telemetry(),
                **record,
            }
        )

    def _micro_step(self) -> None:
        progress, clock, recipe = self.progress, self._clock, self.recipe
        accum, n_ranks = recipe.train.accum, self.ranks.size
        if self._pending is not None:
            arrived = self._pending.values[1]
            if arrived is not None and arrived.query():
                self._settle_all()
        clock.skip()
        tokens_BS, targets_BS = self._next_batch()
        tokens, targets = to_device(self.device, tokens_BS, targets_BS)
        clock.mark("data")
        if self._buckets is not None and progress.micro == accum - 1:
            self._buckets.overlap()
        scale = 1.0 / (n_ranks * accum)
        mark = clock.mark if self._in_parts() else no_mark
        loss = self.engine.train_step(tokens, targets, scale, mark)
        self._loss_sum += loss
        clock.mark("forward")
        progress.micro += 1
        progress.tokens += n_ranks * tokens_BS.size
        if self.display is not None:
            self.display.progress(progress.update, progress.micro)

    def _in_parts(self) -> bool:
        """Whether this update's parts are measured, where that takes launches of its own: the
        third's, which is the first without anything to compile or capture, and some later ones'."""
        if not self.engine.steps_at_once:
            return True
        every, at = self.recipe.log.parts, self.progress.update
        return every > 0 and (at == 2 or (at > 0 and at % every == 0))

    def _next_batch(self) -> Batch:
        """Draw this rank's batch of the next micro-step, and skip the others'."""
        train, ranks, progress = self.recipe.train, self.ranks, self.progress
        for _ in range(ranks.rank):
            self.sampler.skip(train.batch_size)
        batch = self.sampler.next(train.batch_size)
        for _ in range(ranks.size - 1 - ranks.rank):
            self.sampler.skip(train.batch_size)
        if ranks.size > 1 and train.dropout:
            # ranks must not drop the same elements, nor drop others after a resume
            micro_step = progress.update * train.accum + progress.micro
            number = ranks.size * micro_step + ranks.rank
            torch.manual_seed(mix64(mix64(train.seed) + number) >> 1)
        return batch

    def _sum_over_ranks(self) -> Tensor:
        """Sum the gradients over the ranks. Returns the sum of losses, and of several ranks the
        numbers of their decision, on the device."""
        if self._buckets is None:
            return self._loss_sum[None]
        self._clock.skip()
        proposal = torch.tensor(self.ranks.encode(self._proposal()))
        proposal = proposal.to(self.device, non_blocking=True)
        sums = self._buckets.finish(torch.cat((self._loss_sum[None], proposal)))
        self._clock.mark(REDUCE)
        return sums

    def _optimizer_step(self, lr: float) -> Tensor:
        """Clip, step, zero; returns the norm of the averaged gradient, on the device."""
        clip = self.recipe.optimizer.grad_clip
        return clip_and_step(self.optimizer, self.parameters.values(), lr, clip)

    def _evaluate(self, before: Path | None) -> None:
        """Evaluate on the fixed batches, and write the loss into the current checkpoint.

        A checkpoint whose loss is not finite is deleted, unless it is the one from `before`.
        """
        self._settle_all()
        progress, recipe = self.progress, self.recipe
        batches = self.data.eval_batches(
            "val", self.seq_len, recipe.train.batch_size, recipe.eval.batches
        )
        with self._timed("evaluation"):
            result = evaluate(
                self.engine,
                batches,
                stop=lambda: self.stop.received is not None,
                ranks=self.ranks,
            )
        if not result.whole:
            self._agree()
            return  # the resumed run does it again
        if not math.isfinite(result.loss):
            if self.checkpoint is not None and self.checkpoint != before:
                if self.ranks.writes:
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
        if self.metrics is None:
            return
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
        self._settle_all()
        progress = self.progress
        at = (progress.update, progress.micro)
        with self._timed("checkpoint"):
            if self._saved_at != at:
                if self.metrics is not None:
                    self.metrics.flush()
                self.ranks.check_same(
                    self.parameters.values(), f"{self.run}: update {progress.update}"
                )
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
                    self.ranks,
                )
        self._saved_at, self._saved_time = at, time.monotonic()
        self._agreed = self._agreed._replace(save=False)
        if prune:
            self._prune()

    def _prune(self) -> None:
        if not self.ranks.writes:
            return
        with self._timed("checkpoint"):
            prune_checkpoints(self.run, self.recipe.checkpoint.keep)

    def _check_partial(self) -> None:
        """Raise RunFailed rather than save gradients that are not finite."""
        if not self.progress.micro:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        loss_sum, norm = self.ranks.add(self.progress.loss_sum, norm)
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            self._push({"kind": "diverged", "update": self.progress.update + 1})
            raise self._diverged(loss_sum, norm, self.progress.update + 1)

    def _save_if_overdue(self) -> None:
        """Save within an update of many micro-steps, after `checkpoint.minutes`."""
        unfinished = 0 < self.progress.micro < self.recipe.train.accum
        if unfinished and self._decision.save:
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

    def _push(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.push(record)

    def _record(self, record: dict[str, Any]) -> None:
        """Pass a record to the writer and the display, without waiting."""
        with self._timed("display"):
            self._push(record)
            if self.display is not None:
                self.display.progress(self.progress.update, self.progress.micro)
                self.display.push(record)
        if self.metrics is not None and self.metrics.error is not None:
            raise self.metrics.error

    def _notice(self, text: str) -> None:
        if self.display is not None:
            self.display.notice(text)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the time of the block as one part; blocks do not nest."""
        self._clock.skip(part)
        yield
        self._clock.mark(part)
