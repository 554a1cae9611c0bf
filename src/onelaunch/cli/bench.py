"""`onelaunch bench`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from onelaunch.bench.experiments import EXPERIMENTS, ON_THE_GPU
from onelaunch.cli.common import Debug, Quiet, say
from onelaunch.errors import BadInput


def bench(
    experiment: Annotated[
        str, typer.Argument(metavar="EXPERIMENT", help=f"One of: {', '.join(EXPERIMENTS)}.")
    ],
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps; if not given auto for rms-norm, "
            "rms-norm-threshold and rms-norm-training, cpu for the others.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the record goes, by device.")
    ] = Path("benchmarks/records"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and samples.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time ours beside its peers in one run, and leave a record."""
    if experiment not in EXPERIMENTS:
        close = difflib.get_close_matches(experiment, EXPERIMENTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(EXPERIMENTS)}"
        raise BadInput(f"unknown experiment {experiment!r}; {hint}")
    from onelaunch.bench.record import device_name
    from onelaunch.bench.runner import conduct
    from onelaunch.engines.reference import resolve_device

    place = str(resolve_device(device or ("auto" if experiment in ON_THE_GPU else "cpu")))
    say(f"{experiment} on {device_name(place)}: {EXPERIMENTS[experiment]}", quiet)
    print(conduct(experiment, place, quick, out, lambda line: say(line, quiet)))
