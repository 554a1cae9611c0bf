"""The commands. Importing this loads no torch, numpy or numba: each command imports when it
runs."""

from __future__ import annotations

from typing import Annotated

import typer

from onelaunch import __version__
from onelaunch.cli.bench import bench
from onelaunch.cli.chat import chat
from onelaunch.cli.common import Debug
from onelaunch.cli.doctor import doctor
from onelaunch.cli.evaluate import evaluate
from onelaunch.cli.export import export
from onelaunch.cli.generate import generate
from onelaunch.cli.inspect import inspect
from onelaunch.cli.prepare import prepare
from onelaunch.cli.report import report
from onelaunch.cli.serve import serve
from onelaunch.cli.train import train
from onelaunch.cli.tune import tune

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"onelaunch {__version__}")
        raise typer.Exit()


@app.callback()
def onelaunch(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Small transformers with fewer kernel launches."""


for name, verb in (
    ("prepare", prepare),
    ("train", train),
    ("eval", evaluate),
    ("generate", generate),
    ("chat", chat),
    ("serve", serve),
    ("tune", tune),
    ("export", export),
    ("inspect", inspect),
    ("bench", bench),
    ("report", report),
    ("doctor", doctor),
):
    app.command(name)(verb)
