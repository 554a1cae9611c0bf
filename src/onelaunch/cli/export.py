"""`onelaunch export`: a model from one format into another, its tokenizer with it.

Into a Hugging Face folder the tokenizer goes under its usual name, beside OUT/NAME.bin as
NAME.tokenizer.bin (or .bytes, .json): several models share a folder, and loading NAME.bin looks
for that name first. A model whose tokenizer cannot be used is exported without it, and a line on
standard error, with --quiet too, names the file and the reason.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelaunch.checkpoints import writable_formats
from onelaunch.cli.common import Debug, ModelArgument, Quiet, load_model, say
from onelaunch.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from onelaunch.checkpoints.tokenizers import Tokenizer

COREML = "coreml"
FORMATS = (*writable_formats(), COREML)


def export(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file or folder to write; must not exist yet.")
    ],
    format: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}."),
    ],
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    seq: Annotated[
        int | None,
        typer.Option(
            "--seq",
            metavar="N",
            min=1,
            help="coreml: tokens that a program reads at once; 256, or the model's context where "
            "that is less, unless given.",
        ),
    ] = None,
    fusion_depth: Annotated[
        str | None,
        typer.Option(
            "--fusion-depth",
            metavar="DEPTH",
            help="coreml: what one program holds: half a layer, a number of layers, or all (one "
            "program, tokens to logits), which it is unless given.",
        ),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            "--taps",
            metavar="TAPS",
            help="coreml: what programs hand out for a backward pass: none, inputs (each layer's) "
            "or full; none unless given.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="DTYPE", help="coreml: fp16, which they are unless given."
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a model to another format.

    Its tokenizer comes along: into the folder, or beside OUT.bin as OUT.tokenizer.bin (or .json,
    .bytes), where OUT.bin's readers here look first. One that cannot be used is left out, and a
    line says why. Core ML's programs have none.
    """
    if format not in FORMATS:
        raise BadInput(f"--format {format}: must be one of {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; nothing was written: choose another name for OUT")
    if format == COREML:
        if weights not in (None, "fp16"):
            raise BadInput(f"--weights {weights}: must be fp16")
        _export_programs(model, random, out, seq, fusion_depth, taps or "none", quiet)
        return
    programs = {"seq": seq, "fusion-depth": fusion_depth, "taps": taps, "weights": weights}
    for name, value in programs.items():
        if value is not None:
            raise BadInput(f"--{name} {value}: is for --format {COREML}; leave it out")
    if format == "llama2c" and out.suffix != ".bin":
        raise BadInput(f"{out}: a llama2.c file is known by its name: OUT must end in .bin")
    from onelaunch.checkpoints import save
    from onelaunch.checkpoints.tokenizers import find_tokenizer

    if format == "llama2c":
        _refuse_own_tokenizer(out)
    loaded = load_model(model, random)
    unusable = None
    try:
        tokenizer = find_tokenizer(loaded)
    except (BadInput, MissingExtra) as error:
        tokenizer, unusable = None, error
    save(loaded, out, format)
    say(f"wrote {out} ({format}, {_bytes_in(out):,} bytes)", quiet)
    if format == "llama2c" and (loaded.bos_id, loaded.stop_ids) != (1, (1, 2)):
        say(
            f"note: a llama2.c file has no place for the special ids, and its readers take BOS 1 "
            f"and stop at 1 and 2; this model has BOS {loaded.bos_id} and stops at "
            f"{', '.join(map(str, loaded.stop_ids)) or 'none'}",
            quiet,
        )
    if unusable is not None:
        say(f"the tokenizer was left out: {unusable}")
    elif tokenizer is None:
        say(f"no tokenizer found beside {model}; none was written", quiet)
    if tokenizer is None:
        return
    prefix = "" if out.is_dir() else f"{out.stem}."
    try:
        if out.is_dir():
            _save_inside(tokenizer, out, quiet)
        else:
            say(f"wrote {tokenizer.save(out.parent, prefix)}", quiet)
    except BaseException:
        # all of it or nothing: neither OUT nor its own tokenizer was there before
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        for name in _own_names(out) if prefix else ():
            out.with_name(name).unlink(missing_ok=True)
        raise


def _own_names(out: Path) -> list[str]:
    """What the files of OUT.bin's own tokenizer may be called."""
    from onelaunch.checkpoints.tokenizers import FILE_NAMES

    settings = ("tokenizer_config.json", "generation_config.json")
    return [f"{out.stem}.{name}" for name in (*FILE_NAMES, *settings)]


def _refuse_own_tokenizer(out: Path) -> None:
    """What would be taken for OUT.bin's tokenizer must not be there before it."""
    for name in _own_names(out):
        if os.path.lexists(out.with_name(name)):
            raise BadInput(
                f"{out.with_name(name)}: exists already, and would be taken for the tokenizer of "
                f"{out.name}; nothing was written: choose another name for OUT, or remove it"
            )


def _export_programs(
    model: str,
    random: bool,
    out: Path,
    sequence: int | None,
    depth: str | None,
    taps: str,
    quiet: bool,
) -> None:
    from onelaunch.engines.coreml import coremltools
    from onelaunch.engines.coreml.export import checked, write

    loaded = load_model(model, random)
    asked = checked(loaded.config, out, sequence, depth, taps)
    coremltools(f"--format {COREML}")
    written = write(loaded.config, loaded.weights, out, *asked)
    for each in written:
        say(
            f"wrote {each.path} ({each.launch.name}: {each.operations:,} operations, "
            f"{_bytes_in(each.path):,} bytes, {each.emit_seconds + each.save_seconds:.1f} s)",
            quiet,
        )
    say(f"onelaunch inspect {written[0].path} says what would run where", quiet)


def _save_inside(tokenizer: Tokenizer, folder: Path, quiet: bool) -> None:
    """Put the tokenizer into a Hugging Face folder: its own file, and one for transformers."""
    from onelaunch.checkpoints.tokenizer_export import save_for_transformers
    from onelaunch.checkpoints.tokenizers import BytesTokenizer, Llama2cTokenizer

    say(f"wrote {tokenizer.save(folder)}", quiet)
    if isinstance(tokenizer, Llama2cTokenizer | BytesTokenizer):
        say(f"wrote {save_for_transformers(tokenizer, folder)}, for transformers", quiet)


def _bytes_in(out: Path) -> int:
    files = out.rglob("*") if out.is_dir() else [out]
    return sum(file.stat().st_size for file in files if file.is_file())
