"""`onelaunch prepare`: text into token files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onelaunch.cli.common import Debug, Quiet, log
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from onelaunch.training.prepare import Prepared


def prepare(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="UTF-8 text files, and folders of .txt and .md files. A line that holds only "
            "<|endoftext|> separates documents.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.")],
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", help="Train a tokenizer of N pieces."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="A tokenizer.bin, .json or .model, or a .gguf; default: bytes, a vocabulary "
            "of 259.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn text into token files.

    The last tenth is for validation.
    """
    from onelaunch.training.prepare import prepare as prepare_texts

    if vocab_size is not None and tokenizer is not None:
        raise BadInput("--vocab-size trains a tokenizer, --tokenizer names one: give one of them")
    prepared = prepare_texts(
        texts, out, tokenizer or "bytes", vocab_size, progress=lambda line: log(line, quiet)
    )
    log(_summary(prepared, out), quiet)


def _summary(prepared: Prepared, out: Path) -> str:
    manifest = prepared.manifest
    train, val = manifest.splits["train"], manifest.splits["val"]
    n_files = len(manifest.sources)
    lines = [
        f"wrote {out}: {train.tokens:,} tokens to train on and {val.tokens:,} to validate on, "
        f"from {n_files:,} file{'s' if n_files > 1 else ''} "
        f"({manifest.tokenizer.kind}, vocabulary {manifest.vocab_size:,}, {manifest.dtype})"
    ]
    if manifest.eos_id is not None:
        lines.append(
            f"the tokenizer names no BOS: documents end with its EOS, id {manifest.eos_id}"
        )
    elif manifest.bos_id is None:
        lines.append(
            "the tokenizer names neither a BOS nor an EOS: documents follow one another without a "
            "separator, and a model does not learn where a text ends"
        )
    if prepared.ignored:
        lines.append(f"ignored {prepared.ignored:,} files that are hidden or not .txt or .md")
    lines.append(f"next: onelaunch train --data {out}")
    return "\n".join(lines)
