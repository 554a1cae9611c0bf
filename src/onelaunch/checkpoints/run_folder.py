"""Run folders: what `onelaunch train` leaves behind, readable as a model.

    RUN/run.json                      what is trained: configuration, data, versions
    RUN/recipe.toml                   the resolved recipe
    RUN/metrics.jsonl                 telemetry
    RUN/tokenizer.*                   the data's tokenizer
    RUN/best.json                     which checkpoint has the lowest validation loss
    RUN/checkpoints/update-00000100/  model, optimizer, perhaps gradients (.safetensors); state.json

A checkpoint appears by one rename, after every file in it was synced; state.json holds the sha256
of the others and of its own content. A damaged one is recognised and never trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from onelaunch.checkpoints.atomic import (
    atomic_directory,
    read_json,
    sha256_file,
    sync_directory,
    write_json,
)
from onelaunch.checkpoints.lfs import refuse_pointer_at
from onelaunch.checkpoints.tensors import write_tensors
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput

SCHEMA = 1
# Of state.json. 2 added the checksum of its own content; 1 is still read.
STATE_SCHEMA = 2
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
_NAME = re.compile(r"update-(\d{8,})(?:-micro-(\d{4,}))?")


def checkpoint_name(update: int, micro: int) -> str:
    """The folder's name: updates done, and micro-steps of the next where it stopped mid-way."""
    return f"update-{update:08d}" + (f"-micro-{micro:04d}" if micro else "")


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first. Unfinished ones have another name."""
    found = []
    with suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            match = _NAME.fullmatch(path.name)
            if match:
                found.append((int(match[1]), int(match[2] or 0), path))
    return [path for _, _, path in sorted(found)]


def write_checkpoint(
    run: Path, state: dict[str, Any], files: Mapping[str, dict[str, Tensor]]
) -> Path:
    """Write one checkpoint atomically.

    `files` maps file names to their tensors; `state` must hold `update` and `micro` and be plain
    JSON data. Raises BadInput where the place cannot be written; nothing that was there is touched.
    """
    target = run / "checkpoints" / checkpoint_name(state["update"], state["micro"])
    if target.exists():
        # A damaged one of the same progress: it could not be resumed from.
        shutil.rmtree(target, ignore_errors=True)
    with atomic_directory(target) as folder:
        sums = {}
        for name, tensors in files.items():
            write_tensors(folder / name, tensors)
            sums[name] = sha256_file(folder / name)
        _write_state(folder, state, sums)
    return target


def change_state(checkpoint: Path, changes: Mapping[str, Any]) -> None:
    """Replace fields of a checkpoint's state.json, atomically; its tensors stay as they are."""
    state = read_state(checkpoint)
    _write_state(checkpoint, {**state, **changes}, state["sha256"])


def _write_state(folder: Path, state: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    state = {**state, "schema": STATE_SCHEMA, "sha256": dict(sums)}
    sums = {**sums, STATE_FILE: _state_digest(state)}
    write_json(folder / STATE_FILE, {**state, "sha256": sums})


def _state_digest(state: Mapping[str, Any]) -> str:
    """The sha256 of a state's content, whatever its white space; `state` is without the digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json; raises BadInput where it is missing, damaged or of another schema.

    Its `sha256` holds the checksums of the other files.
    """
    path = checkpoint / STATE_FILE
    state = read_json(path)
    if (schema := state.get("schema")) not in (1, STATE_SCHEMA):
        raise BadInput(f"{path}: schema {schema!r} is not {STATE_SCHEMA}, the one read here")
    for name in ("update", "micro"):
        if type(state.get(name)) is not int or not 0 <= state[name] < 1 << 53:
            raise BadInput(f"{path}: {name} is not a count")
    sums = state.get("sha256")
    if not isinstance(sums, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in sums.items()
    ):
        raise BadInput(f"{path}: the checksums are missing")
    if schema != 1 and sums.pop(STATE_FILE, None) != _state_digest(state):
        raise BadInput(f"{path}: damaged: its checksum is not the recorded one")
    return state


def read_tensors(checkpoint: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """One file's tensors, its checksum verified first; raises BadInput where it is damaged."""
    path = checkpoint / name
    refuse_pointer_at(path)
    _check_file(path, state["sha256"].get(name))
    try:
        return load_file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a valid safetensors file ({error})") from error


def _check_file(path: Path, expected: str | None) -> None:
    try:
        found = sha256_file(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    if found != expected:
        raise BadInput(f"{path}: damaged: its checksum is not the recorded one")


def newest_whole_checkpoint(run: Path) -> tuple[Path, dict[str, Any], dict[Path, str]]:
    """The newest checkpoint whose files all match their checksums, its state, and each damaged one
    that was passed over with what is wrong with it. Raises BadInput where there is none."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            state = read_state(checkpoint)
            for name, expected in state["sha256"].items():
                _check_file(checkpoint / Path(name).name, expected)
        except BadInput as error:
            damaged[checkpoint] = str(error)
            continue
        return checkpoint, state, damaged
    hint = next(iter(damaged.values()), "it has none")
    raise BadInput(f"{run}: no whole checkpoint to read ({hint}); train anew in another folder")


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they no longer count as checkpoints."""
    for checkpoint in damaged:
        with suppress(OSError):
            checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest, the newest `keep` of whole updates, and the best; leftovers of
    killed writes too."""
    found = list_checkpoints(run)
    kept = {*found[-1:], *[path for path in found if "-micro-" not in path.name][-keep:]}
    kept.add(best_checkpoint(run) or run)
    for checkpoint in found:
        if checkpoint not in kept:
            # Renamed first, so that a kill in the middle leaves no half checkpoint behind.
            doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
            with suppress(OSError):
                checkpoint.rename(doomed)
    with suppress(OSError):
        for leftover in (run / "checkpoints").glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    sync_directory(run / "checkpoints")


def set_best(run: Path, checkpoint: Path, update: int, val_loss: float) -> None:
    """Point best.json at a checkpoint."""
    best = {"schema": SCHEMA, "checkpoint": checkpoint.name, "update": update, "val_loss": val_loss}
    write_json(run / "best.json", best)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint that best.json points at, if it is there."""
    try:
        return _named_best(run)
    except BadInput:
        return None


def _named_best(run: Path) -> Path:
    """The checkpoint that best.json points at; raises BadInput where there is none."""
    best = run / "best.json"
    name = read_json(best).get("checkpoint")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(f"{best}: damaged: it names no checkpoint")
    path = run / "checkpoints" / name
    if not path.is_dir():
        raise BadInput(f"{best}: its checkpoint {name} is missing")
    return path


def read_run(run: Path) -> dict[str, Any]:
    """run.json, its schema checked."""
    data = read_json(run / "run.json")
    if data.get("schema") != SCHEMA:
        raise BadInput(f"{run / 'run.json'}: schema {data.get('schema')!r} is not {SCHEMA}")
    return data


def matches(path: Path) -> bool:
    """Whether `path` is a run folder, or one checkpoint of it."""
    return path.is_dir() and ((path / "run.json").is_file() or (path / "state.json").is_file())


def read(path: Path) -> LoadedModel:
    """The best checkpoint of a run folder (the newest whole one if no evaluation has chosen yet or
    the best is damaged), or the given checkpoint.

    The model's `notices` name what is damaged and what was read instead.
    """
    if (path / STATE_FILE).is_file():
        return _read_checkpoint(path)
    run = read_run(path)
    passed: list[str] = []
    if (path / "best.json").exists():
        try:
            return _read_checkpoint(_named_best(path), path)
        except BadInput as error:
            passed.append(str(error))
    if not list_checkpoints(path):
        raise BadInput(f"{path}: this run has no checkpoint yet (it was to be {run.get('name')})")
    checkpoint, _, damaged = newest_whole_checkpoint(path)
    passed += [reason for reason in damaged.values() if reason not in passed]
    model = _read_checkpoint(checkpoint, path)
    model.notices = tuple(
        f"passed over a damaged checkpoint: {reason}; {checkpoint.name} is used instead"
        for reason in passed
    )
    return model


def _read_checkpoint(checkpoint: Path, source: Path | None = None) -> LoadedModel:
    state = read_state(checkpoint)
    config = ModelConfig.from_dict(state.get("config"), str(checkpoint / "state.json"))
    weights = read_tensors(checkpoint, MODEL_FILE, state)
    check_weights(config, weights, checkpoint / MODEL_FILE)
    bos = state.get("bos_id", 1)
    stops = state.get("stop_ids", [1, 2])
    if not (bos is None or type(bos) is int) or not (
        isinstance(stops, list) and all(type(stop) is int for stop in stops)
    ):
        raise BadInput(f"{checkpoint / 'state.json'}: bos_id or stop_ids are not token ids")
    return LoadedModel(
        config=config,
        weights={name: weights[name].to(torch.float32) for name in config.weight_shapes()},
        source=source or checkpoint.resolve().parent.parent,
        format="run",
        bos_id=bos,
        stop_ids=tuple(stops),
    )
