"""Every experiment that applies to a machine, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from onelaunch.bench.core.record import Log
from onelaunch.bench.core.runner import conduct
from onelaunch.bench.core.tables import Cell, by_columns
from onelaunch.bench.experiments import EXPERIMENTS, ON_THE_GPU
from onelaunch.compilation.background import in_a_line
from onelaunch.errors import BadInput, MissingExtra


@dataclass(frozen=True)
class Done:
    """How an experiment ended: with a record, skipped as it does not apply here, or failed."""

    experiment: str
    seconds: float
    record: Path | None = None
    skipped: str = ""
    failed: str = ""


def conduct_all(
    device_of: Callable[[bool], str], quick: bool, folder: Path, log: Log
) -> list[Done]:
    """Run them all. `device_of` returns an experiment's device; its argument is whether the
    experiment runs on a GPU where there is one. One that cannot run here, or fails, stops none of
    the others; what was measured before an interrupt is on disk."""
    done: list[Done] = []
    for number, (name, about) in enumerate(EXPERIMENTS.items(), 1):
        log(f"[{number}/{len(EXPERIMENTS)}] {name}: {about}")
        start, record, skipped, failed = time.monotonic(), None, "", ""
        try:
            record = conduct(name, device_of(name in ON_THE_GPU), quick, folder, log)
        except (BadInput, MissingExtra) as error:
            skipped = in_a_line(error)
            log(f"{name}: skipped: {skipped}")
        except Exception as error:  # whatever a peer or a library raises ends this experiment alone
            failed = in_a_line(error)
            log(f"{name}: failed: {failed}")
        done.append(Done(name, time.monotonic() - start, record, skipped, failed))
    return done


def summary(done: Iterable[Done]) -> str:
    """A table of how each ended."""
    columns: dict[str, Cell] = {
        "experiment": lambda each: each.experiment,
        "seconds": lambda each: f"{each.seconds:.0f}",
        "ended": lambda each: str(
            each.record
            or (f"skipped: {each.skipped}" if each.skipped else f"failed: {each.failed}")
        ),
    }
    return by_columns(done, columns)
