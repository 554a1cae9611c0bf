"""Start or resume a run: from a recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch import __version__
from onelaunch.checkpoints.atomic import write_error, write_json, write_text
from onelaunch.checkpoints.run_folder import (
    MODEL_FILE,
    SCHEMA,
    list_checkpoints,
    newest_whole_checkpoint,
    prune_checkpoints,
    read_run,
    read_tensors,
    set_best,
)
from onelaunch.checkpoints.weights import check_weights
from onelaunch.config import ModelConfig
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import metrics as telemetry
from onelaunch.training import state as saved
from onelaunch.training.data import TokenData, open_data
from onelaunch.training.display import Display, Header
from onelaunch.training.loop import Outcome, Trainer
from onelaunch.training.recipe import Recipe
from onelaunch.training.signals import StopSignals
from onelaunch.training.state import Progress


def start(recipe: Recipe, run: Path, quiet: bool = False) -> Outcome:
    """Train from random weights into a new run folder.

    Raises BadInput where the folder holds something already, or the recipe does not fit its data.
    """
    if run.exists() and not run.is_dir():
        raise BadInput(f"{run}: is a file; choose another --run folder")
    if run.is_dir() and any(run.iterdir()):
        raise BadInput(
            f"{run}: already holds files; --resume continues a run, --run names a new folder"
        )
    # everything that can be wrong is asked before the folder is made
    resolve_device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    data = open_data(recipe.data.path, recipe.train.seed)
    config = recipe.model_config(data.vocab_size)
    _check_lengths(recipe, config)
    weights = _begin(recipe, config)
    try:
        (run / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise write_error(run, error) from error
    write_text(run / "recipe.toml", recipe.to_toml())
    data.tokenizer.save(run)
    write_json(run / "run.json", _describe(run, config, data))
    with _only_here(run):
        return _train(recipe, run, config, weights, data, quiet)


def resume(
    run: Path, settings: dict[str, Any], given: Recipe | None = None, quiet: bool = False
) -> Outcome:
    """Continue a run from its newest whole checkpoint, exactly where it was.

    `settings` change the saved recipe, save for the model and the data. `given`, a recipe named
    again, must describe the same model. Raises BadInput where it does not.
    """
    if not (run / "run.json").is_file():
        raise BadInput(f"{run}: is not a run folder (no run.json), so there is nothing to resume")
    saved_recipe = Recipe.load(str(run / "recipe.toml"))
    recipe = saved_recipe.with_settings(settings, "--set") if settings else saved_recipe
    described = ModelConfig.from_dict(read_run(run).get("config"), str(run / "run.json"))
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    data = open_data(recipe.data.path, recipe.train.seed)
    if recipe.model_config(data.vocab_size) != described or (
        given is not None and given.model_config(data.vocab_size) != described
    ):
        raise BadInput(
            f"{run}: is a run of another model; choose another --run folder, "
            "or leave out what changes the model"
        )
    with _only_here(run):
        if settings:
            _check_unfinished(run, recipe, saved_recipe)
            write_text(run / "recipe.toml", recipe.to_toml())
        if not list_checkpoints(run):
            # stopped before its first: the recipe alone says how it begins
            weights = _begin(recipe, described)
            return _train(recipe, run, described, weights, data, quiet)
        checkpoint, state, passed_over = newest_whole_checkpoint(run)
        config = ModelConfig.from_dict(state.get("config"), str(checkpoint / "state.json"))
        if config != described:
            raise BadInput(f"{checkpoint}: is a checkpoint of another model than {run}'s")
        if state.get("data") != data.fingerprint:
            raise BadInput(
                f"{run}: its data is not {recipe.data.path} as it is now; resume needs the same"
            )
        weights = read_tensors(checkpoint, MODEL_FILE, state)
        check_weights(config, weights, checkpoint / MODEL_FILE)
        return _train(recipe, run, config, weights, data, quiet, (checkpoint, state, passed_over))


def _check_unfinished(run: Path, recipe: Recipe, before: Recipe) -> None:
    """An update that has begun must end with the accumulation it began with."""
    if recipe.train.accum == before.train.accum or not list_checkpoints(run):
        return
    micro = newest_whole_checkpoint(run)[1]["micro"]
    if micro:
        raise BadInput(
            f"--accum {recipe.train.accum}: {run} stopped after {micro} of {before.train.accum} "
            "micro-steps of an update; finish it with the same accum first"
        )


def _begin(recipe: Recipe, config: ModelConfig) -> dict[str, Tensor]:
    """The first weights; leaves PyTorch's random state as a run begins."""
    weights = dict(Model(config).init_weights(recipe.train.seed).state_dict())
    torch.manual_seed(recipe.train.seed)
    return weights


def _train(
    recipe: Recipe,
    run: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    data: TokenData,
    quiet: bool,
    resumed: tuple[Path, dict[str, Any], list[str]] | None = None,
) -> Outcome:
    train = recipe.train
    engine = ReferenceEngine(
        config,
        weights,
        device=train.device,
        dtype=None if train.dtype == "auto" else train.dtype,
        dropout=train.dropout,
        compile=train.compile,
        train=True,
    )
    progress = saved.read_progress(resumed[1], resumed[0]) if resumed else Progress()
    telemetry.drop_after(run / "metrics.jsonl", progress.update, progress.evaluated)
    if resumed and progress.best_update == progress.update and progress.micro == 0:
        # the kill may have come between the checkpoint and best.json
        set_best(run, resumed[0], progress.update, progress.best_val_loss or 0.0)
    seq_len = train.seq_len or config.max_seq_len
    writer = telemetry.MetricsWriter(run / "metrics.jsonl")
    display: Display | None = None
    try:
        with StopSignals() as stop:
            trainer = Trainer(
                recipe=recipe,
                run=run,
                engine=engine,
                data=data,
                sampler=data.train(seq_len, train.seed),
                optimizer=make_optimizer(engine.parameters(), recipe),
                metrics=writer,
                stop=stop,
                progress=progress,
                checkpoint=resumed[0] if resumed else None,
                seq_len=seq_len,
            )
            if resumed:
                saved.restore(
                    resumed[0],
                    resumed[1],
                    trainer.parameters,
                    trainer.optimizer,
                    trainer.sampler,
                )
            writer.push(_run_record(recipe, config, data, trainer.device, progress))
            if not quiet:
                display = Display(
                    _header(recipe, run, config, data, trainer.device, seq_len),
                    (progress.update, progress.micro),
                )
                for line in resumed[2] if resumed else []:
                    display.notice(line)
                if resumed:
                    display.notice(f"resumed from {resumed[0].name}")
                trainer.display = display
            return trainer.train()
    finally:
        writer.close()
        if display is not None:
            if writer.dropped:
                display.notice(f"{writer.dropped} telemetry records were dropped: a slow disk")
            display.close()


def make_optimizer(parameters: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (1711.05101) with weight decay on matrices only; the fused form where there is one."""
    o = recipe.optimizer
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": o.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused)


def default_run_folder(name: str) -> Path:
    """runs/NAME-DATE-TIME."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_lengths(recipe: Recipe, config: ModelConfig) -> None:
    if recipe.train.seq_len > config.max_seq_len:
        raise BadInput(
            f"train.seq_len is {recipe.train.seq_len}, beyond the model's context of "
            f"{config.max_seq_len}; lower it, or raise model.max_seq_len"
        )


def _describe(run: Path, config: ModelConfig, data: TokenData) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": run.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.to_dict(),
        "parameters": config.n_params,
        "data": {
            "label": data.label,
            "fingerprint": data.fingerprint,
            "synthetic": data.synthetic,
            "tokenizer": data.tokenizer.fingerprint,
        },
        "environment": {
            "onelaunch": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def _run_record(
    recipe: Recipe, config: ModelConfig, data: TokenData, device: torch.device, at: Progress
) -> dict[str, Any]:
    return {
        "kind": "run",
        "schema": telemetry.SCHEMA,
        "update": at.update,
        "micro": at.micro,
        "updates": recipe.train.updates,
        "accum": recipe.train.accum,
        "parameters": config.n_params,
        "data": data.label,
        "synthetic": data.synthetic,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.time(),
    }


def _header(
    recipe: Recipe,
    run: Path,
    config: ModelConfig,
    data: TokenData,
    device: torch.device,
    seq_len: int,
) -> Header:
    train = recipe.train
    per_micro = train.batch_size * seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Header(
        title=f"onelaunch train: {run}",
        lines=(
            f"model  {config.n_params / 1e6:.2f} million parameters: dim {config.dim}, "
            f"{config.n_layers} layers, {config.n_heads} heads, vocabulary {config.vocab_size}",
            f"data   {data.label}",
            f"update {train.accum} micro-step{'s' if train.accum > 1 else ''} of "
            f"{train.batch_size} x {seq_len} = {per_micro * train.accum:,} tokens; on {name}",
        ),
        updates=train.updates,
        accum=train.accum,
        tokens_per_micro_step=per_micro,
    )


@contextmanager
def _only_here(run: Path) -> Iterator[None]:
    """Refuse a second process in the same run folder. The lock goes with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise write_error(run / ".lock", error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{run}: another process is training in this folder") from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(OSError):
            prune_checkpoints(run, keep=10**9)
        yield
    finally:
        os.close(descriptor)
