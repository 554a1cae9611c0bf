"""Start or resume a training run: from a recipe to a finished run folder."""

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
from onelaunch.checkpoints.chat_template_files import CHAT_TEMPLATE_FILE, write_chat_template
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
from onelaunch.training.dry_run import describe_run, measure_update
from onelaunch.training.engines import engine_name, make_engine
from onelaunch.training.flops import TrainingFlops
from onelaunch.training.folders import (
    make_unique_folder,
    path_from_run,
    with_absolute_data,
    with_absolute_paths,
    with_relocated_data,
)
from onelaunch.training.initial import load_init
from onelaunch.training.loop import Outcome, Trainer
from onelaunch.training.memory import check_fits, explain_out_of_memory, fit_in_memory
from onelaunch.training.optim import Optimizer, make_optimizer
from onelaunch.training.ranks import ALONE, Ranks
from onelaunch.training.recipe import Recipe, differences
from onelaunch.training.samples import encode_prompt
from onelaunch.training.signals import StopSignals
from onelaunch.training.sinks import check_installed, start_sinks
from onelaunch.training.state import Progress


@dataclass(frozen=True)
class _Setup:
    """The objects of a run, validated before anything is written."""

    recipe: Recipe
    run: Path
    data: TokenData
    engine: ReferenceEngine
    optimizer: Optimizer
    sampler: Sampler
    seq_len: int
    notices: tuple[str, ...] = ()
    chat_template: str | None = None


@dataclass(frozen=True)
class _Resumed:
    """The checkpoint of a resumed run, its progress, and notices for the user."""

    checkpoint: Path
    state: dict[str, Any]
    progress: Progress
    notices: tuple[str, ...]


def start(
    recipe: Recipe,
    run: Path,
    quiet: bool = False,
    numbered: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train into a new run folder, from random weights or those of `train.init`; the outcome has
    the folder's path.

    `numbered` adds -2, -3, ... to the name of the folder if it exists. Of several ranks the first
    makes the folder, once all are ready. Raises BadInput if the folder is not empty, the recipe
    does not match its data, or the run cannot fit in memory; RunFailed if it diverges, runs out of
    memory, or the disk is full.
    """
    unstarted = not numbered and ranks.writes and _is_free(run)
    with StopSignals() as stop, explain_out_of_memory(recipe):
        data = _open_data(recipe, ranks)
        setup = _initial_setup(with_absolute_data(recipe), run, data, ranks)
        _check_ranks(setup.recipe, data, ranks)
        if ranks.writes:
            existed = run.is_dir()
            if numbered:
                setup = replace(setup, run=make_unique_folder(run))
            _make_folder(setup, unstarted, existed and not numbered)
        setup = replace(setup, run=ranks.from_first(setup.run))
        with _run_lock(setup.run, ranks), explain_out_of_memory(recipe, setup.run):
            return _train(setup, stop, quiet, ranks)


def resume(
    run: Path,
    settings: dict[str, Any],
    expected: Recipe | None = None,
    quiet: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Continue a run exactly, from its newest valid checkpoint.

    `settings` change the saved recipe, except its model, its data and `train.init`. The recipe
    `expected` must describe the same model; it has no other effect. The number of ranks may be
    another one, except in the middle of an update. Raises BadInput if the model or the data differ;
    the run is then unchanged.
    """
    if not (run / "run.json").is_file():
        raise BadInput(f"{run}: not a run folder (no run.json); nothing to resume")
    saved_recipe = Recipe.load(str(run / "recipe.toml"))
    recipe = with_absolute_paths(saved_recipe.with_settings(settings, "settings"))
    if recipe.train.init != saved_recipe.train.init:
        raise BadInput(
            f"init={settings['train.init']!r}: {run} has weights already, and continues with "
            "these; leave it out, or start a new run"
        )
    with StopSignals() as stop, _run_lock(run, ranks), explain_out_of_memory(recipe, run):
        run_json = read_run(run)
        if "data.path" in settings:
            recipe = with_absolute_data(recipe)
        else:
            recipe = with_relocated_data(recipe, run, run_json)
        config = ModelConfig.from_dict(run_json.get("config"), str(run / "run.json"))
        data = _open_data(recipe, ranks)
        for candidate in (recipe, expected):
            if candidate is not None:
                init = config if candidate.train.init else None
                _check_same_model(run, config, candidate.model_config(data.vocab_size, init))
        changed = recipe if recipe != saved_recipe else None
        if not list_checkpoints(run):
            # stopped before its first checkpoint: start again from the recipe
            setup = _initial_setup(recipe, run, data, ranks)
            _check_same_model(run, config, setup.engine.config)
            _check_ranks(recipe, data, ranks)
            return _train(setup, stop, quiet, ranks, changed=changed)
        checkpoint, state, damaged = newest_valid_checkpoint(run)
        _check_state(run, checkpoint, state, recipe, config, data, ranks.size)
        _check_memory(recipe, config)
        weights = read_tensors(checkpoint, MODEL_FILE, state)
        check_weights(config, weights, checkpoint / MODEL_FILE)
        setup = _build(recipe, run, config, weights, data)
        progress = saved.read_progress(state, checkpoint)
        saved.restore(
            checkpoint, state, setup.engine, setup.optimizer, setup.sampler, progress, ranks.rank
        )
        _check_ranks(recipe, data, ranks)
        notices = [f"skipped a damaged checkpoint: {reason}" for reason in damaged.values()]
        notices.append(f"resumed from {checkpoint.name}")
        if state.get("threads") != torch.get_num_threads():
            notices.append(
                f"threads changed from {state.get('threads')} to {torch.get_num_threads()}: the "
                "last bits may differ from an uninterrupted run"
            )
        # older checkpoints, without these choices, have neither
        name = setup.engine.describe()["engine"]
        if (before := state.get("engine", name)) != name:
            notices.append(
                f"engine changed from {before} to {name}: results may differ in the last bits; "
                f"train.engine={before} keeps it"
            )
        elif (forms := state.get("forms")) and not setup.engine.use_forms(forms):
            notices.append(
                "the training step has other tiles than before: results may differ in the last bits"
            )
        if (norm := state.get("norm", "torch")) != setup.engine.norm:
            notices.append(
                f"norm changed from {norm} to {setup.engine.norm}: results may differ in the last "
                f"bits; train.norm={norm} keeps it"
            )
        if (before := state.get("ranks", 1)) != ranks.size:
            notices.append(
                f"processes changed from {before} to {ranks.size}: an update has "
                f"{ranks.size * recipe.train.accum} micro-steps, it had {before * state['accum']}"
            )
        if expected and with_absolute_paths(with_absolute_data(expected)) != recipe:
            notices.append("the recipe of the run is used; change it by single settings")
        if ranks.writes:
            mark_damaged(damaged)
        resumed = _Resumed(checkpoint, state, progress, tuple(notices))
        return _train(setup, stop, quiet, ranks, resumed, changed)


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Describe the run that `start` would begin, see `dry_run.describe_run`; nothing is trained or
    written. Raises what `start` raises before it writes, except for a run that cannot fit in
    memory."""
    with explain_out_of_memory(recipe):
        data = _open_data(recipe, ALONE)
        init = load_init(recipe, data)
        config = init.config if init else recipe.model_config(data.vocab_size)
        seq_len = _sequence_length(recipe, config)
        device = resolve_device(recipe.train.device)
        fit = fit_in_memory(recipe, config, seq_len, device)
        if fit.misfit is not None:
            facts = describe_run(recipe, config, data, seq_len, fit, None)
            return {
                **facts,
                "engine": engine_name(recipe, config),
                "device": str(device),
                "dtype": None,
            }
        setup = _initial_setup(recipe, Path(), data, ALONE)
        engine = setup.engine.describe()
        seconds = None
        try:
            # these compile first, which takes longer
            if recipe.train.engine != "coreml" and not recipe.train.compile:
                setup.engine.wait()
                seconds = measure_update(setup.engine, setup.optimizer, recipe, seq_len)
        finally:
            setup.engine.close()
        facts = describe_run(recipe, config, data, seq_len, fit, seconds)
        return {**facts, **{key: engine[key] for key in ("engine", "device", "dtype")}}


def _open_data(recipe: Recipe, ranks: Ranks) -> TokenData:
    if ranks.size > 1 and recipe.coreml.compile_budget:
        raise BadInput("coreml.compile_budget: is for one process alone; leave it out")
    ranks.use_device(recipe.train.device)
    resolve_device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    return open_data(recipe.data.path, recipe.train.seed)


def _check_ranks(recipe: Recipe, data: TokenData, ranks: Ranks) -> None:
    """Raise BadInput on a rank whose recipe or data are not rank 0's; the others wait for it."""
    if ranks.size == 1:
        return
    settings = {line for line in recipe.to_toml().splitlines() if not line.startswith("path = ")}
    first_settings, first_data = ranks.from_first((settings, data.fingerprint))
    if different := ", ".join(sorted(settings - first_settings)):
        raise BadInput(f"{different}: differs from rank 0; start all processes with equal options")
    if data.fingerprint != first_data:
        raise BadInput(f"{recipe.data.path}: the data differs from rank 0's")
    ranks.wait()


def _check_same_model(path: Path, saved_config: ModelConfig, config: ModelConfig) -> None:
    """Raise BadInput naming the fields in which two configurations differ."""
    if different := differences(saved_config, config):
        raise BadInput(
            f"{path}: has another model ({different}); pass another folder, run=DIR, or "
            "leave out what changes the model"
        )


def _check_state(
    run: Path,
    checkpoint: Path,
    state: dict[str, Any],
    recipe: Recipe,
    config: ModelConfig,
    data: TokenData,
    n_ranks: int,
) -> None:
    """Raise BadInput unless a checkpoint can continue with this recipe, model, data and number of
    processes."""
    source = str(checkpoint / "state.json")
    saved_config = ModelConfig.from_dict(state.get("config"), source)
    _check_same_model(checkpoint, saved_config, config)
    if state.get("data") != data.fingerprint:
        raise BadInput(
            f"{run}: the data {recipe.data.path} has changed; resume needs the same data"
        )
    # older checkpoints, without this choice, are AdamW's
    if (name := state.get("optimizer", "adamw")) != recipe.optimizer.name:
        raise BadInput(
            f"optimizer.name = {recipe.optimizer.name!r}: {run} has the state of {name}; leave it "
            "out, or start a new run"
        )
    if state["micro"] and state.get("accum") != recipe.train.accum:
        raise BadInput(
            f"accum={recipe.train.accum}: {run} stopped after {state['micro']} of "
            f"{state.get('accum')} micro-steps of an update; finish it with the same accum first"
        )
    if state["micro"] and (before := state.get("ranks", 1)) != n_ranks:
        raise BadInput(
            f"{run}: stopped after {state['micro']} of {state.get('accum')} micro-steps of an "
            f"update in each of {before} processes, not {n_ranks}; finish it with {before} first"
        )


def _initial_setup(recipe: Recipe, run: Path, data: TokenData, ranks: Ranks) -> _Setup:
    """Set up a run from the weights of `train.init`, or random ones, and seed PyTorch."""
    init = load_init(recipe, data)
    config = init.config if init else recipe.model_config(data.vocab_size)
    _check_memory(recipe, config)
    if init:
        weights, notices, template = init.weights, init.notices, init.chat_template
    else:
        weights = dict(Model(config).init_weights(recipe.train.seed).state_dict())
        notices, template = (), None
    setup = _build(recipe, run, config, ranks.weights_from_first(weights), data)
    torch.manual_seed(recipe.train.seed)
    recipe = with_absolute_paths(recipe)
    return replace(setup, recipe=recipe, notices=notices, chat_template=template)


def _sequence_length(recipe: Recipe, config: ModelConfig) -> int:
    if recipe.train.seq_len > config.max_seq_len:
        raise BadInput(
            f"train.seq_len {recipe.train.seq_len} exceeds the model's context of "
            f"{config.max_seq_len}; lower it, or raise model.max_seq_len"
        )
    return recipe.train.seq_len or config.max_seq_len


def _check_memory(recipe: Recipe, config: ModelConfig) -> None:
    device = resolve_device(recipe.train.device)
    check_fits(recipe, config, _sequence_length(recipe, config), device)


def _build(
    recipe: Recipe, run: Path, config: ModelConfig, weights: dict[str, Tensor], data: TokenData
) -> _Setup:
    train = recipe.train
    check_installed(recipe)
    seq_len = _sequence_length(recipe, config)
    sampler = data.train(seq_len, train.seed)
    # raises for a validation split that is too short, before the first step
    data.eval_batches("val", seq_len, train.batch_size, recipe.eval.batches)
    encode_prompt(recipe.eval.prompt, data.tokenizer, config)  # raises for one that is too long
    engine = make_engine(recipe, config, weights)
    optimizer = make_optimizer(engine.parameters(), recipe, engine.flat)
    return _Setup(recipe, run, data, engine, optimizer, sampler, seq_len)


def _is_free(run: Path) -> bool:
    """Return whether a folder has the files of a start that was killed; raises BadInput unless it
    has those alone, or none."""
    if run.exists() and not run.is_dir():
        raise BadInput(f"{run}: is a file; choose another folder, run=DIR")
    unstarted = run.is_dir() and _is_unstarted(run)
    if run.is_dir() and any(run.iterdir()) and not unstarted:
        raise _not_empty(run)
    return unstarted


def _is_unstarted(run: Path) -> bool:
    """Return whether a folder has only the files of a start that was killed before run.json."""
    settings = {"tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE_FILE}
    initial = {"checkpoints", "recipe.toml", ".lock", *FILE_NAMES, *settings}
    checkpoints = run / "checkpoints"
    entries = {path.name for path in run.iterdir() if not path.name.endswith(".tmp")}
    return checkpoints.is_dir() and not any(checkpoints.iterdir()) and entries <= initial


def _not_empty(run: Path) -> BadInput:
    return BadInput(
        f"{run}: is not empty; resume=True continues a run, run=DIR sets another folder"
    )


def _make_folder(setup: _Setup, unstarted: bool, existed: bool) -> None:
    """Write the first files of a run folder, run.json last; on an error remove everything, except
    the folder if it `existed`."""
    run = setup.run
    try:
        if unstarted:
            (run / "checkpoints").rmdir()
        # fails in one of two concurrent starts
        (run / "checkpoints").mkdir(parents=True)
    except FileExistsError:
        raise _not_empty(run) from None
    except OSError as error:
        raise write_error(run, error) from error
    try:
        write_text(run / "recipe.toml", setup.recipe.to_toml())
        setup.data.tokenizer.save(run)
        if setup.chat_template is not None:
            write_chat_template(run, setup.chat_template)
        write_json(run / "run.json", _describe(setup))
    except BaseException as error:
        for path in run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not existed:
            run.rmdir()
        if isinstance(error, OSError):
            raise write_error(run, error) from error
        raise


def _train(
    setup: _Setup,
    stop: StopSignals,
    quiet: bool,
    ranks: Ranks,
    resumed: _Resumed | None = None,
    changed: Recipe | None = None,
) -> Outcome:
    """Run the loop, with telemetry. `changed` replaces the recipe of the run."""
    if not ranks.writes:
        try:
            return _trainer(setup, stop, ranks, resumed, None).train()
        finally:
            setup.engine.close()
    run = setup.run
    progress = resumed.progress if resumed else Progress()
    notices = [*setup.notices, *(resumed.notices if resumed else ())]
    if resumed and not (run / "metrics.jsonl").exists():
        notices.append("metrics.jsonl is missing: a new one starts here")
    if changed is not None:
        write_text(run / "recipe.toml", changed.to_toml())
    telemetry.drop_after(run / "metrics.jsonl", progress.update, progress.evaluated)
    if resumed and progress.best_update == progress.update > 0 and progress.micro == 0:
        # the run may have been killed between the checkpoint and best.json
        set_best(run, resumed.checkpoint, progress.update, progress.best_val_loss or 0.0)
    writer = telemetry.MetricsWriter(run / "metrics.jsonl")
    display: Display | None = None
    try:
        trainer = _trainer(setup, stop, ranks, resumed, writer)
        writer.push(_run_record(setup, progress, ranks))
        if not quiet:
            display = Display(
                _header(setup, trainer.flops, ranks), (progress.update, progress.micro)
            )
            for line in notices:
                display.notice(line)
            trainer.display = display
            writer.log = display.notice
            setup.engine.log_to(display.notice)
        writer.sinks = start_sinks(setup.recipe, run, progress.update, writer.log)
        outcome = trainer.train()
    finally:
        setup.engine.close()
        writer.close()
        if display is not None:
            if writer.dropped:
                display.notice(
                    f"{writer.dropped} telemetry records were dropped: the disk is too slow"
                )
            display.close()
    if writer.error is not None:
        raise writer.error
    return outcome


def _trainer(
    setup: _Setup,
    stop: StopSignals,
    ranks: Ranks,
    resumed: _Resumed | None,
    metrics: telemetry.MetricsWriter | None,
) -> Trainer:
    return Trainer(
        recipe=setup.recipe,
        run=setup.run,
        engine=setup.engine,
        data=setup.data,
        sampler=setup.sampler,
        optimizer=setup.optimizer,
        metrics=metrics,
        stop=stop,
        progress=resumed.progress if resumed else Progress(),
        checkpoint=resumed.checkpoint if resumed else None,
        seq_len=setup.seq_len,
        ranks=ranks,
    )


def _describe(setup: _Setup) -> dict[str, Any]:
    config, data = setup.engine.config, setup.data
    return {
        "schema": SCHEMA,
        "name": setup.run.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": config.to_dict(),
        "parameters": config.n_params,
        "data": {
            "label": data.label,
            "path_from_run": path_from_run(setup.recipe.data.path, setup.run),
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


def _run_record(setup: _Setup, at: Progress, ranks: Ranks) -> dict[str, Any]:
    return {
        "kind": "run",
        "schema": telemetry.SCHEMA,
        "update": at.update,
        "micro": at.micro,
        "updates": setup.recipe.train.updates,
        "accum": setup.recipe.train.accum,
        "ranks": ranks.size,
        "parameters": setup.engine.config.n_params,
        "data": setup.data.label,
        "synthetic": setup.data.synthetic,
        "seed": setup.recipe.train.seed,
        "engine": setup.engine.describe()["engine"],
        "device": str(setup.engine.device),
        "norm": setup.engine.norm,
        "forms": setup.engine.forms(setup.recipe.train.batch_size, setup.seq_len),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "time": time.time(),
    }


def _header(setup: _Setup, flops: TrainingFlops, ranks: Ranks) -> Header:
    train, config, device = setup.recipe.train, setup.engine.config, setup.engine.device
    per_micro = ranks.size * train.batch_size * setup.seq_len
    each = f"in each of {ranks.size} processes " if ranks.size > 1 else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    engine = setup.engine.describe()["engine"]
    by = f"norm {setup.engine.norm}" if engine == "reference" else f"engine {engine}"
    if (setup.engine.forms(train.batch_size, setup.seq_len) or {}).get("source") == "tuned":
        by += ", tuned"
    where = f"seed {train.seed}, on {name}, {by}"
    start = f", from {train.init}" if train.init else ""
    return Header(
        title=f"onelaunch train: {setup.run}",
        lines=(
            f"model  {config.n_params / 1e6:.2f} million parameters: dim {config.dim}, "
            f"{config.n_layers} layers, {config.n_heads} heads, vocabulary {config.vocab_size}"
            f"{start}",
            f"data   {setup.data.label}",
            f"update {train.accum} micro-step{'s' if train.accum > 1 else ''} of "
            f"{train.batch_size} x {setup.seq_len} {each}= {per_micro * train.accum:,} tokens; "
            f"{where}",
        ),
        updates=train.updates,
        accum=train.accum,
        tokens_per_micro_step=per_micro,
        flops=flops,
    )


@contextmanager
def _run_lock(run: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Lock a run folder by the first rank, for which the others wait."""
    with _file_lock(run) if ranks.writes else contextlib.nullcontext():
        ranks.wait()
        yield


@contextmanager
def _file_lock(run: Path) -> Iterator[None]:
    """Lock a run folder against a second process. The lock ends with the process."""
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
