"""Every experiment that applies to a machine, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onelaunch.bench.core.record import Say
from onelaunch.bench.core.runner import conduct, in_a_line
from onelaunch.bench.core.tables import markdown
from onelaunch.bench.experiments import EXPERIMENTS, ON_THE_GPU
from onelaunch.errors import BadInput, MissingExtra, OnelaunchError


@dataclass(frozen=True)
class Done:
    """How an experiment ended: with a record, skipped as it does not apply here, or failed."""

    experiment: str
    seconds: float
    record: Path | None = None
    skipped: str = ""
    failed: str = ""


def conduct_all(
    device_of: Callable[[bool], str], quick: bool, folder: Path, say: Say
) -> list[Done]:
    """Run them all. `device_of` gives the device of an experiment, told whether it is one that runs
    on a GPU where there is one. One that cannot run here, or fails, keeps none of the others; what
    was measured before an interrupt is on disk."""
    found: list[Done] = []
    for number, (name, what) in enumerate(EXPERIMENTS.items(), 1):
        say(f"[{number}/{len(EXPERIMENTS)}] {name}: {what}")
        start = time.monotonic()
        done = _one(name, device_of(name in ON_THE_GPU), quick, folder, say)
        found.append(Done(name, time.monotonic() - start, *done))
        if done[1] or done[2]:
            say(f"{name}: {'skipped' if done[1] else 'failed'}: {done[1] or done[2]}")
    return found


def _one(
    name: str, device: str, quick: bool, folder: Path, say: Say
) -> tuple[Path | None, str, str]:
    try:
        return conduct(name, device, quick, folder, say), "", ""
    except (BadInput, MissingExtra) as error:
        return None, in_a_line(error), ""
    except OnelaunchError as error:
        return None, "", in_a_line(error)
    except Exception as error:  # whatever a peer or a library raises ends this experiment alone
        return None, "", in_a_line(error)


def summary(found: list[Done]) -> str:
    """A table of how each ended."""
    rows = []
    for done in found:
        ended = str(done.record) if done.record else ""
        if not ended:
            ended = f"skipped: {done.skipped}" if done.skipped else f"failed: {done.failed}"
        rows.append([done.experiment, f"{done.seconds:.0f}", ended])
    return markdown(["experiment", "seconds", "ended"], rows)
