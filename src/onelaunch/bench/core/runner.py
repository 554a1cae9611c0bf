"""Runs one experiment and keeps its rows: the record, and next to it, where the experiment has
them, a table and a picture of the whole record.

An experiment is a module with UNIT and `run(device, quick, log)`, which returns or yields rows. It
may have `table(record) -> str` and `draw(record) -> Figure | None`. One that has PEERS, names of
programs that its user may have built, takes `peers` too: their paths.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from onelaunch.bench.core import plots
from onelaunch.bench.core.record import Log, Row, device_name, record_path, rows_there, write_record
from onelaunch.bench.experiments import NOT_ON_A_GPU, OF_THE_CUDA_ENGINE, devices, module_name
from onelaunch.checkpoints.atomic import read_json, write_text
from onelaunch.compilation.background import in_a_line
from onelaunch.errors import BadInput, RunFailed

SAVE_SECONDS = 5.0


def conduct(
    experiment: str,
    device: str,
    quick: bool,
    folder: Path,
    log: Log,
    peers: Mapping[str, Path] | None = None,
) -> Path:
    """Run an experiment on a device; returns the record's path.

    Rows are on disk a few seconds after they are made: a run that fails, or is stopped, leaves
    those that it had. Raises BadInput, before anything runs, where it does not run on the device,
    or there is no place for a record or for a peer, and RunFailed where there were no rows.
    """
    check_device(experiment, device)
    module = importlib.import_module(module_name(experiment))
    options = _with_peers(experiment, module, peers or {})
    name = device_name(device)
    _make_place(record_path(experiment, folder, name))
    fresh: list[Row] = []
    path: Path | None = None

    def keep() -> None:
        nonlocal path, fresh
        if fresh:
            path = write_record(experiment, module.UNIT, fresh, folder, name)
            fresh = []

    def close() -> None:
        if path is not None:
            _write_views(module, path, log)
            log(f"record: {path}")

    saved_at = time.monotonic()
    try:
        for row in module.run(device, quick, log, **options):
            fresh.append(row)
            log(row.line(module.UNIT))
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                keep()
                saved_at = time.monotonic()
    except BaseException:
        try:
            keep()
        except Exception as error:
            log(f"the last rows are lost: {in_a_line(error)}")
        close()
        raise
    keep()
    close()
    if path is None:
        raise RunFailed(f"{experiment}: no case could be timed")
    return path


def check_device(experiment: str, device: str) -> None:
    """Raise BadInput where an experiment does not run on a device."""
    kind, kinds = device.partition(":")[0], devices(experiment)
    reason = ""
    if kinds and kind not in kinds:
        reason = f"it runs on {' or '.join(kinds)}"
        if kind == "cuda":
            reason += f": {NOT_ON_A_GPU[experiment]}"
    elif kind == "cuda" and experiment in OF_THE_CUDA_ENGINE:
        import torch

        from onelaunch.engines.cuda import why_not

        reason = why_not(torch.device(device)) or ""
    if reason:
        raise BadInput(f"{experiment}: --device {device}: {reason}")


def _with_peers(
    experiment: str, module: ModuleType, peers: Mapping[str, Path]
) -> dict[str, Mapping[str, Path]]:
    """The options of `run` on peers. Raises BadInput for a peer that it does not know."""
    known = getattr(module, "PEERS", ())
    for name in peers:
        if name not in known:
            which = f"knows {', '.join(known)} only" if known else "takes none"
            raise BadInput(f"--peer {name}: {experiment} {which}; leave it out")
    return {"peers": peers} if known else {}


def _make_place(path: Path) -> None:
    """Read what is there already and make its folder: what is wrong with either is an error now,
    not after the run."""
    rows_there(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path.parent}: cannot be made ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path.parent}: cannot be written to")


def _write_views(module: ModuleType, path: Path, log: Log) -> None:
    """Table and picture of a record. They can be made again from it: where one fails, a line says
    so, and an older one, which would be taken for this record's, goes."""

    def write_table(target: Path) -> None:
        text = module.table(read_json(path))
        write_text(target, text)
        log(text.rstrip())

    def write_picture(target: Path) -> None:
        figure = module.draw(read_json(path))
        if figure is None:
            target.unlink(missing_ok=True)
        else:
            plots.save(figure, target)

    for view, what, suffix, write in (
        ("table", "a table", ".md", write_table),
        ("draw", "a picture", ".png", write_picture),
    ):
        if hasattr(module, view):
            try:
                write(path.with_suffix(suffix))
            except Exception as error:
                path.with_suffix(suffix).unlink(missing_ok=True)
                log(f"without {what}: {in_a_line(error)}")
