"""Validation loss after equally many tokens, by micro-steps an update and by how the learning rate
follows them: the trainer itself, with PyTorch, on the built-in stories."""

from __future__ import annotations

from collections.abc import Iterator

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import trainer as timed_trainer
from onelaunch.errors import BadInput
from onelaunch.training.evaluate import evaluate
from onelaunch.training.recipe import Recipe

MODEL, BATCH, SEQUENCE = "stories260k", 4, 64
MICRO_STEPS, QUICK_MICRO_STEPS = 1000, 100
ACCUMS, QUICK_ACCUMS = (1, 10, 50, 100), (1, 10, 50)
RULES, QUICK_RULES = ("none", "sqrt", "linear"), ("none", "linear")
BASE_ACCUM = 10
"""At which all rules are the same rate, and where seeds say how much chance does."""
SEEDS, QUICK_SEEDS = (1, 2, 3), (1, 2)
RATE = 3e-3
"""At BASE_ACCUM; below quickstart's 8e-3, so that ten times as much is still a rate to try."""
WARMUP_SHARE = 0.05
EVAL_BATCH, EVAL_BATCHES = 64, 4


def learning(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """A row for each number of micro-steps and rule: the loss in nats."""
    seeds = QUICK_SEEDS if quick else SEEDS
    micro_steps = QUICK_MICRO_STEPS if quick else MICRO_STEPS
    for accum in QUICK_ACCUMS if quick else ACCUMS:
        same = accum == BASE_ACCUM
        for rule in ("any",) if same else QUICK_RULES if quick else RULES:
            recipe = _recipe(accum, "none" if same else rule, micro_steps)
            case = f"learning {MODEL}, accum {accum}, rule {rule}"
            try:
                losses = [_loss(recipe, device, seed) for seed in (seeds if same else seeds[:1])]
            except BadInput as error:  # the loss is no number any more: the trainer says so
                log(f"{case}: {error}")
                continue
            notes = {
                "accum": accum,
                "rule": rule,
                "rate": recipe.optimizer.lr * recipe.lr_scale(),
                "updates": recipe.train.updates,
                "tokens": micro_steps * BATCH * SEQUENCE,
                "unit": "nats",
                "range": round(max(losses) - min(losses), 5),
            }
            yield Row.of(case, losses, notes=notes)


def _recipe(accum: int, rule: str, micro_steps: int) -> Recipe:
    updates = micro_steps // accum
    settings = {
        "model.preset": MODEL,
        "model.max_seq_len": SEQUENCE,
        "train.batch_size": BATCH,
        "train.accum": accum,
        "train.updates": updates,
        "optimizer.lr": RATE,
        "optimizer.lr_rule": rule,
        "optimizer.lr_base_accum": BASE_ACCUM,
        "optimizer.warmup": max(1, round(WARMUP_SHARE * updates)),
    }
    return Recipe().with_settings(settings, "bench")


def _loss(recipe: Recipe, device: str, seed: int) -> float:
    """The validation loss, of the same sequences for every one."""
    with timed_trainer(recipe.with_settings({"train.seed": seed}, "bench"), device) as trainer:
        for _ in range(recipe.train.updates):
            trainer._update()
        batches = trainer.data.eval_batches("val", trainer.seq_len, EVAL_BATCH, EVAL_BATCHES)
        return evaluate(trainer.engine, batches).loss
