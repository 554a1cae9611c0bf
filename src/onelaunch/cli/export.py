"""`onelaunch export`: a model from one format into another, its tokenizer with it.

A model whose tokenizer cannot be used is exported without it, and a line on standard error, with
--quiet too, names the file and the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onelaunch.checkpoints import GGUF, writable_formats
from onelaunch.cli.common import Debug, ModelArgument, Quiet, load_model, log
from onelaunch.errors import BadInput

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
            help="coreml: tokens that a program reads at once; default: 256, or the model's "
            "context where that is less.",
        ),
    ] = None,
    fusion_depth: Annotated[
        str | None,
        typer.Option(
            "--fusion-depth",
            metavar="DEPTH",
            help="coreml: what one program holds: half a layer, a number of layers, or all (one "
            "program, tokens to logits); default: all.",
        ),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            "--taps",
            metavar="TAPS",
            help="coreml: what programs hand out for a backward pass: none, inputs (each layer's) "
            "or full; default: none.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="DTYPE",
            help="gguf: f32, f16, bf16, q8_0 or q4_0; default: the model's. coreml: fp16, the "
            "default.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a model to another format.

    Its tokenizer comes along: into the folder, into a GGUF file, or next to OUT.bin as
    OUT.tokenizer.bin (or .json, .bytes), where OUT.bin's readers here look first. One that cannot
    be used is left out, and a line on standard error has the reason. Core ML's programs have none.
    """
    if format not in FORMATS:
        raise BadInput(f"--format {format}: must be one of {', '.join(FORMATS)}")
    from onelaunch.checkpoints.export import check_out

    check_out(out, format)
    if format == COREML:
        if weights not in (None, "fp16"):
            raise BadInput(f"--weights {weights}: must be fp16")
        _export_programs(model, random, out, seq, fusion_depth, taps or "none", quiet)
        return
    if format != GGUF and weights is not None:
        raise BadInput(f"--weights {weights}: is for --format {GGUF} or {COREML}; leave it out")
    programs = {"seq": seq, "fusion-depth": fusion_depth, "taps": taps}
    for name, value in programs.items():
        if value is not None:
            raise BadInput(f"--{name} {value}: is for --format {COREML}; leave it out")
    _export_model(model, random, out, format, weights, quiet)


def _export_model(
    model: str, random: bool, out: Path, format: str, weights: str | None, quiet: bool
) -> None:
    from onelaunch.checkpoints.export import export as export_model

    loaded = load_model(model, random)
    exported = export_model(loaded, out, format, weights)
    log(f"wrote {out} ({format}, {exported.n_bytes:,} bytes)", quiet)
    for note in exported.notes:
        log(note, quiet)
    if exported.unusable is not None:
        log(f"the tokenizer was left out: {exported.unusable}")
    elif exported.tokenizer is None:
        log(f"no tokenizer found next to {model}; none was written", quiet)
    elif exported.tokenizer != out:
        log(f"wrote {exported.tokenizer}", quiet)
    if exported.for_transformers is not None:
        log(f"wrote {exported.for_transformers}, for transformers", quiet)


def _export_programs(
    model: str,
    random: bool,
    out: Path,
    sequence: int | None,
    depth: str | None,
    taps: str,
    quiet: bool,
) -> None:
    from onelaunch.checkpoints.export import bytes_in
    from onelaunch.engines.coreml import coremltools
    from onelaunch.engines.coreml.export import checked, write

    loaded = load_model(model, random)
    options = checked(loaded.config, out, sequence, depth, taps)
    coremltools(f"--format {COREML}")
    written = write(loaded.config, loaded.weights, out, *options)
    for each in written:
        log(
            f"wrote {each.path} ({each.launch.name}: {each.operations:,} operations, "
            f"{bytes_in(each.path):,} bytes, {each.emit_seconds + each.save_seconds:.1f} s)",
            quiet,
        )
    log(f"onelaunch inspect {written[0].path} shows what would run where", quiet)
