"""Options that several commands share, and their log on standard error."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from onelaunch.config import PRESETS
from onelaunch.errors import BadInput, ModelNotFound

if TYPE_CHECKING:
    from onelaunch.checkpoints.weights import LoadedModel

debug = False
"""Whether an error shows its traceback; set by `--debug`."""


def _set_debug(value: bool) -> bool:
    global debug
    debug = debug or value
    return value


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .bin or .gguf file, a Hugging Face folder, a run folder, or a preset with "
        "--random.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_set_debug, help="Show the traceback of an error."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def log(text: str, quiet: bool = False) -> None:
    """Print a line for the user on standard error, unless quiet."""
    if not quiet:
        # standard error may be gone: what is being done matters more
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_line(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows a text in one line of the terminal behind standard error, in the place of the text
    before, cut to the window's width; shows nothing elsewhere. The line is gone at the end."""
    live = not quiet and sys.stderr.isatty()

    def show(text: str) -> None:
        if live:
            columns = _columns()
            with contextlib.suppress(OSError):
                print(f"\r{text[: columns - 1]}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def _columns() -> int:
    """The current width of the terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def load_model(model: str, random: bool = False, offers_random: bool = True) -> LoadedModel:
    """Load MODEL: with `random` a preset, else a file or folder. `offers_random`: whether the
    command has --random. Its notices go to standard error, with --quiet too: the user gets another
    model than the one that was named. Raises BadInput."""
    from onelaunch.checkpoints import load, random_model

    if random:
        if model not in PRESETS and os.path.exists(model):
            raise BadInput(
                f"{model}: --random is for presets ({', '.join(PRESETS)}); leave it out to take "
                "this model"
            )
        return random_model(model)
    if not model:
        raise BadInput("MODEL is empty; give a file or a folder")
    try:
        loaded = load(model)
    except ModelNotFound as error:
        training = f"train one with: onelaunch train --preset {model}"
        if model in PRESETS:
            speed = "add --random to try its speed, or " if offers_random else ""
            raise BadInput(
                f"{model}: a preset is a shape without weights; {speed}{training}"
            ) from error
        if offers_random:
            raise BadInput(
                f"{error} (presets: {', '.join(PRESETS)}, each with --random)"
            ) from error
        raise
    for line in loaded.notices:
        log(line)
    return loaded


def batch_shape(text: str) -> tuple[int, int]:
    """The sequences and their tokens of `--training`, such as 64x256. Raises BadInput."""
    batch, x, sequence = text.partition("x")
    if not (x and batch.isdecimal() and sequence.isdecimal()):
        raise BadInput(f"--training {text}: must be as 64x256, sequences and tokens of each")
    return int(batch), int(sequence)


def program() -> str:
    """How to call this program: by name where it is on the PATH, else as it was called."""
    argv0 = sys.argv[0]
    if shutil.which("onelaunch") or not argv0.endswith("onelaunch"):
        return "onelaunch"
    return argv0
