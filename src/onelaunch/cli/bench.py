"""`onelaunch bench`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from onelaunch.bench.experiments import EXPERIMENTS, ON_THE_GPU
from onelaunch.cli.common import Debug, Quiet, log
from onelaunch.errors import BadInput, RunFailed

ALL = "all"


def bench(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT",
            help=f"One of: {', '.join(EXPERIMENTS)}; or all: every one that applies here.",
        ),
    ],
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps; default: auto for "
            f"{', '.join(name for name in EXPERIMENTS if name in ON_THE_GPU)}, cpu for the others.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the record goes, by device.")
    ] = Path("benchmarks/records"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and samples.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME=PATH",
            help="A program to compare with ours, for generate: run.c=PATH, or llama.cpp=PYTHON, a "
            "Python that has xllamacpp and gguf. May be given several times.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time ours and its peers in one run, and write a record."""
    if experiment not in (*EXPERIMENTS, ALL):
        close = difflib.get_close_matches(experiment, EXPERIMENTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(EXPERIMENTS)}, all"
        raise BadInput(f"unknown experiment {experiment!r}; {hint}")
    peers = _peers(peer or [])
    if experiment == ALL:
        _all(device, quick, out, peers, quiet)
        return
    from onelaunch.bench.core.record import device_name
    from onelaunch.bench.core.runner import conduct
    from onelaunch.engines.reference import resolve_device

    place = str(resolve_device(device or ("auto" if experiment in ON_THE_GPU else "cpu")))
    log(f"{experiment} on {device_name(place)}: {EXPERIMENTS[experiment]}", quiet)
    print(conduct(experiment, place, quick, out, lambda line: log(line, quiet), peers))


def _all(device: str | None, quick: bool, out: Path, peers: dict[str, Path], quiet: bool) -> None:
    if peers:
        raise BadInput("--peer goes with one experiment, not with all; leave it out")
    from onelaunch.bench.everything import conduct_all, summary
    from onelaunch.engines.reference import resolve_device

    def device_of(on_the_gpu: bool) -> str:
        return str(resolve_device(device or ("auto" if on_the_gpu else "cpu")))

    finished = conduct_all(device_of, quick, out, lambda line: log(line, quiet))
    print(summary(finished))
    failed = [done.experiment for done in finished if done.failed]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(finished)} experiments failed: {', '.join(failed)}")


def _peers(named: list[str]) -> dict[str, Path]:
    """The paths by name. Raises BadInput for what is no NAME=PATH, and for a name given twice."""
    peers: dict[str, Path] = {}
    for each in named:
        name, sign, path = each.partition("=")
        if not (name and sign and path):
            raise BadInput(f"--peer {each}: must be NAME=PATH, such as run.c=llama2.c/run")
        if name in peers:
            raise BadInput(f"--peer {name}: given twice; give one path")
        peers[name] = Path(path)
    return peers
