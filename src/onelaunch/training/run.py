"""Start or resume a run: from a recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    mark_damaged,
    newest_valid_checkpoint,
    prune_checkpoints,
    read_run,
    read_tensors,
    set_best,
)
from onelaunch.checkpoints.tokenizers import FILE_NAMES
from onelaunch.checkpoints.weights import check_weights
from onelaunch.config import ModelConfig
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import metrics as telemetry
from onelaunch.training import state as saved
from onelaunch.training.data import Sampler, TokenData, open_data
from onelaunch.training.display import Display, Header
from onelaunch.training.folders import (
    claim,
    path_from_run,
    with_absolute_data,
    with_found_data,
)
from onelaunch.training.loop import Outcome, Trainer
from onelaunch.training.memory import check_fits, names_batch_size
from onelaunch.training.recipe import Recipe
from onelaunch.training.signals import StopSignals
from onelaunch.training.state import Progress


@dataclass(frozen=True)
class _Parts:
    """What a run is made of, each part checked, before anything is written."""

    recipe: Recipe
    run: Path
    data: TokenData
    engine: ReferenceEngine
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    seq_len: int


@dataclass(frozen=True)
class _Resumed:
    """Where a resumed run goes on, and what its user should know."""

    checkpoint: Path
    state: dict[str, Any]
    progress: Progress
    notices: tuple[str, ...]


def start(recipe: Recipe, run: Path, quiet: bool = False, numbered: bool = False) -> Outcome:
    """Train from random weights into a new run folder; the outcome names it.

    `numbered` adds -2, -3, ... to the folder's name where it is taken. Raises BadInput where the
    folder holds something already, the recipe does not fit its data, or the run cannot fit in
    memory; RunFailed where it diverges, or memory or the disk do not suffice.
    """
    if not numbered and run.exists() and not run.is_dir():
        raise BadInput(f"{run}: is a file; choose another folder, run=DIR")
    begun = not numbered and run.is_dir() and _only_begun(run)
    if not numbered and run.is_dir() and any(run.iterdir()) and not begun:
        raise _holds_files(run)
    with StopSignals() as stop, names_batch_size(recipe):
        data = _open_data(recipe)
        recipe = with_absolute_data(recipe)
        config = recipe.model_config(data.vocab_size)
        parts = _first_parts(recipe, run, config, data)
        existed = run.is_dir()
        if numbered:
            parts = replace(parts, run=claim(run))
        _make_folder(parts, begun, existed and not numbered)
        with _only_here(parts.run), names_batch_size(recipe, parts.run):
            return _train(parts, stop, quiet)


def resume(
    run: Path, settings: dict[str, Any], given: Recipe | None = None, quiet: bool = False
) -> Outcome:
    """Continue a run from its newest whole checkpoint, exactly where it was.

    `settings` change the saved recipe, save for the model and the data. `given`, a recipe named
    again, must describe the same model. Raises BadInput where it does not; the run is then as it
    was.
    """
    if not (run / "run.json").is_file():
        raise BadInput(f"{run}: is not a run folder (no run.json), so there is nothing to resume")
    saved_recipe = Recipe.load(str(run / "recipe.toml"))
    recipe = saved_recipe.with_settings(settings, "settings")
    with StopSignals() as stop, _only_here(run), names_batch_size(recipe, run):
        described = read_run(run)
        if "data.path" in settings:
            recipe = with_absolute_data(recipe)
        else:
            recipe = with_found_data(recipe, run, described)
        config = ModelConfig.from_dict(described.get("config"), str(run / "run.json"))
        data = _open_data(recipe)
        for named in (recipe, given):
            if named is not None:
                _check_same_model(f"{run}: is a run", config, named.model_config(data.vocab_size))
        changed = recipe if recipe != saved_recipe else None
        if not list_checkpoints(run):
            # stopped before its first: the recipe alone says how it begins
            return _train(_first_parts(recipe, run, config, data), stop, quiet, changed=changed)
        checkpoint, state, damaged = newest_valid_checkpoint(run)
        _check_state(run, checkpoint, state, recipe, config, data)
        _check_memory(recipe, config)
        weights = read_tensors(checkpoint, MODEL_FILE, state)
        check_weights(config, weights, checkpoint / MODEL_FILE)
        parts = _build(recipe, run, config, weights, data)
        progress = saved.read_progress(state, checkpoint)
        saved.restore(checkpoint, state, parts.engine, parts.optimizer, parts.sampler)
        notices = [f"passed over a damaged checkpoint: {reason}" for reason in damaged.values()]
        notices.append(f"resumed from {checkpoint.name}")
        if state.get("threads") != torch.get_num_threads():
            notices.append(
                f"PyTorch had {state.get('threads')} threads, now {torch.get_num_threads()}: the "
                "last bits of what follows may differ from an uninterrupted run"
            )
        # a checkpoint that names no norm was made before there was a choice
        if (norm := state.get("norm", "torch")) != parts.engine.norm:
            notices.append(
                f"the norm was {norm}, now it is {parts.engine.norm}: the last bits of what "
                f"follows may differ; train.norm={norm} keeps it"
            )
        if given is not None and with_absolute_data(given) != recipe:
            notices.append(
                "the run's own recipe is used; single settings change it, a named recipe does not"
            )
        mark_damaged(damaged)
        resumed = _Resumed(checkpoint, state, progress, tuple(notices))
        return _train(parts, stop, quiet, resumed, changed)


def _open_data(recipe: Recipe) -> TokenData:
    resolve_device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    return open_data(recipe.data.path, recipe.train.seed)


def _check_same_model(what: str, config: ModelConfig, other: ModelConfig) -> None:
    """Raise BadInput naming the fields in which a run's configuration is not the one here."""
    there, here = config.to_dict(), other.to_dict()
    different = [f"{k} is {there[k]}, here {here[k]}" for k in there if there[k] != here[k]]
    if different:
        raise BadInput(
            f"{what} of another model ({'; '.join(different)}); choose another folder, run=DIR, or "
            "leave out what changes the model"
        )


def _check_state(
    run: Path,
    checkpoint: Path,
    state: dict[str, Any],
    recipe: Recipe,
    config: ModelConfig,
    data: TokenData,
) -> None:
    """Raise BadInput unless a checkpoint goes on with this recipe, model and data."""
    source = str(checkpoint / "state.json")
    found = ModelConfig.from_dict(state.get("config"), source)
    _check_same_model(f"{checkpoint}: is a checkpoint", found, config)
    if state.get("data") != data.fingerprint:
        raise BadInput(
            f"{run}: its data is not {recipe.data.path} as it is now; resume needs the same"
        )
    if state["micro"] and state.get("accum") != recipe.train.accum:
        raise BadInput(
            f"accum={recipe.train.accum}: {run} stopped after {state['micro']} of "
            f"{state.get('accum')} micro-steps of an update; finish it with the same accum first"
        )


def _first_parts(recipe: Recipe, run: Path, config: ModelConfig, data: TokenData) -> _Parts:
    """A run at its beginning; leaves PyTorch's random state as it begins."""
    _check_memory(recipe, config)
    weights = dict(Model(config).init_weights(recipe.train.seed).state_dict())
    parts = _build(recipe, run, config, weights, data)
    torch.manual_seed(recipe.train.seed)
    return parts


def _sequence_length(recipe: Recipe, config: ModelConfig) -> int:
    if recipe.train.seq_len > config.max_seq_len:
        raise BadInput(
            f"train.seq_len is {recipe.train.seq_len}, beyond the model's context of "
            f"{config.max_seq_len}; lower it, or raise model.max_seq_len"
        )
    return recipe.train.seq_len or config.max_seq_len


def _check_memory(recipe: Recipe, config: ModelConfig) -> None:
    device = resolve_device(recipe.train.device)
    check_fits(recipe, config, _sequence_length(recipe, config), device)


def _build(
    recipe: Recipe, run: Path, config: ModelConfig, weights: dict[str, Tensor], data: TokenData
) -> _Parts:
    train = recipe.train
    seq_len = _sequence_length(recipe, config)
    sampler = data.train(seq_len, train.seed)
    # checked at the call: a validation split that is too short is said before the first step
    data.eval_batches("val", seq_len, train.batch_size, recipe.eval.batches)
    engine = _engine(recipe, config, weights)
    optimizer = make_optimizer(engine.parameters(), recipe)
    return _Parts(recipe, run, data, engine, optimizer, sampler, seq_len)


def _engine(recipe: Recipe, config: ModelConfig, weights: dict[str, Tensor]) -> ReferenceEngine:
    train, programs = recipe.train, recipe.coreml
    if train.engine == "coreml":
        from onelaunch.compilation.cache import Store
        from onelaunch.engines.coreml.training import CoreMLTrainer

        return CoreMLTrainer(
            config,
            weights,
            programs.fusion_depth,
            programs.taps,
            programs.staleness,
            programs.dtype,
            programs.compile_budget,
            Store(),
        )
    return ReferenceEngine(
        config,
        weights,
        device=train.device,
        dtype=None if train.dtype == "auto" else train.dtype,
        dropout=train.dropout,
        compile=train.compile,
        train=True,
        norm=train.norm,
    )


def _only_begun(run: Path) -> bool:
    """Whether a folder holds no more than a start that was killed leaves before run.json."""
    begun = {"checkpoints", "recipe.toml", ".lock", *FILE_NAMES}
    made = run / "checkpoints"
    entries = {path.name for path in run.iterdir() if not path.name.endswith(".tmp")}
    return made.is_dir() and not any(made.iterdir()) and entries <= begun


def _holds_files(run: Path) -> BadInput:
    return BadInput(
        f"{run}: already holds files; resume=True continues a run, run=DIR names a new folder"
    )


def _make_folder(parts: _Parts, begun: bool, existed: bool) -> None:
    """Write what a run folder begins with, run.json last; on an error nothing is left behind but
    the folder where it `existed`."""
    run = parts.run
    try:
        if begun:
            (run / "checkpoints").rmdir()
        # of two starts at once, one makes it
        (run / "checkpoints").mkdir(parents=True)
    except FileExistsError:
        raise _holds_files(run) from None
    except OSError as error:
        raise write_error(run, error) from error
    try:
        write_text(run / "recipe.toml", parts.recipe.to_toml())
        parts.data.tokenizer.save(run)
        write_json(run / "run.json", _describe(parts))
    except BaseException as error:
        for path in run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not existed:
            run.rmdir()
        if isinstance(error, OSError):
            raise write_error(run, error) from error
        raise


def _train(
    parts: _Parts,
    stop: StopSignals,
    quiet: bool,
    resumed: _Resumed | None = None,
    changed: Recipe | None = None,
) -> Outcome:
    """Run the loop, with telemetry. `changed` is written over the run's recipe."""
    run = parts.run
    progress = resumed.progress if resumed else Progress()
    notices = list(resumed.notices) if resumed else []
    if resumed and not (run / "metrics.jsonl").exists():
        notices.append("metrics.jsonl was removed: its records begin anew here")
    if changed is not None:
        write_text(run / "recipe.toml", changed.to_toml())
    telemetry.drop_after(run / "metrics.jsonl", progress.update, progress.evaluated)
    if resumed and progress.best_update == progress.update > 0 and progress.micro == 0:
        # the kill may have come between the checkpoint and best.json
        set_best(run, resumed.checkpoint, progress.update, progress.best_val_loss or 0.0)
    writer = telemetry.MetricsWriter(run / "metrics.jsonl")
    display: Display | None = None
    try:
        trainer = Trainer(
            recipe=parts.recipe,
            run=run,
            engine=parts.engine,
            data=parts.data,
            sampler=parts.sampler,
            optimizer=parts.optimizer,
            metrics=writer,
            stop=stop,
            progress=progress,
            checkpoint=resumed.checkpoint if resumed else None,
            seq_len=parts.seq_len,
        )
        writer.push(_run_record(parts, progress))
        if not quiet:
            display = Display(_header(parts), (progress.update, progress.micro))
            for line in notices:
                display.notice(line)
            trainer.display = display
            writer.say = display.notice
            parts.engine.log_to(display.notice)
        outcome = trainer.train()
    finally:
        parts.engine.close()
        writer.close()
        if display is not None:
            if writer.dropped:
                display.notice(f"{writer.dropped} telemetry records were dropped: a slow disk")
            display.close()
    if writer.error is not None:
        raise writer.error
    return outcome


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


def _describe(parts: _Parts) -> dict[str, Any]:
    config, data = parts.engine.config, parts.data
    return {
        "schema": SCHEMA,
        "name": parts.run.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.to_dict(),
        "parameters": config.n_params,
        "data": {
            "label": data.label,
            "path_from_run": path_from_run(parts.recipe.data.path, parts.run),
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


def _run_record(parts: _Parts, at: Progress) -> dict[str, Any]:
    return {
        "kind": "run",
        "schema": telemetry.SCHEMA,
        "update": at.update,
        "micro": at.micro,
        "updates": parts.recipe.train.updates,
        "accum": parts.recipe.train.accum,
        "parameters": parts.engine.config.n_params,
        "data": parts.data.label,
        "synthetic": parts.data.synthetic,
        "seed": parts.recipe.train.seed,
        "device": str(parts.engine.device),
        "norm": parts.engine.norm,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.time(),
    }


def _header(parts: _Parts) -> Header:
    train, config, device = parts.recipe.train, parts.engine.config, parts.engine.device
    per_micro = train.batch_size * parts.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    where = f"seed {train.seed}, on {name}, norm {parts.engine.norm}"
    return Header(
        title=f"onelaunch train: {parts.run}",
        lines=(
            f"model  {config.n_params / 1e6:.2f} million parameters: dim {config.dim}, "
            f"{config.n_layers} layers, {config.n_heads} heads, vocabulary {config.vocab_size}",
            f"data   {parts.data.label}",
            f"update {train.accum} micro-step{'s' if train.accum > 1 else ''} of "
            f"{train.batch_size} x {parts.seq_len} = {per_micro * train.accum:,} tokens; {where}",
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
