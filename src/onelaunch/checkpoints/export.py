"""A model with its tokenizer, from one format into another: all of it, or nothing.

In a Hugging Face folder the tokenizer has its usual name; beside OUT/NAME.bin it is
NAME.tokenizer.bin (or .bytes, .json): several models share a folder, and loading NAME.bin looks
for that name first. The chat template is chat_template.jinja or NAME.chat_template.jinja.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from onelaunch.checkpoints import save
from onelaunch.checkpoints.chat_template_files import CHAT_TEMPLATE_FILE, write_chat_template
from onelaunch.checkpoints.tokenizer_export import save_for_transformers
from onelaunch.checkpoints.tokenizers import (
    FILE_NAMES,
    BytesTokenizer,
    Llama2cTokenizer,
    Tokenizer,
    find_tokenizer,
)
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.errors import BadInput, MissingExtra

LLAMA2C = "llama2c"


@dataclass(frozen=True)
class Exported:
    """The files of an exported model.

    n_bytes: of the model's own.
    tokenizer: the tokenizer's file; None where none was written.
    for_transformers: a further file that makes the tokenizer one of transformers.
    unusable: why the model's tokenizer was left out, where it could not be used.
    loses_special_ids: whether BOS or the stop ids are others than the format's readers take.
    """

    n_bytes: int
    tokenizer: Path | None = None
    for_transformers: Path | None = None
    unusable: Exception | None = None
    loses_special_ids: bool = False


def check_out(out: Path, format: str) -> None:
    """Raise BadInput where `out` exists, is not a name for the format, or has a file beside it that
    would be taken for its tokenizer."""
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; nothing was written: choose another name")
    if format != LLAMA2C:
        return
    if out.suffix != ".bin":
        raise BadInput(f"{out}: a llama2.c file is known by its name: it must end in .bin")
    for name in _own_names(out):
        if os.path.lexists(out.with_name(name)):
            raise BadInput(
                f"{out.with_name(name)}: exists already, and would be taken for the tokenizer of "
                f"{out.name}; nothing was written: choose another name for it, or remove the file"
            )


def export(model: LoadedModel, out: Path, format: str) -> Exported:
    """Write a model and its tokenizer, if it has one that can be used. Raises what `check_out` and
    `checkpoints.save` do; after an error nothing is left behind."""
    check_out(out, format)
    unusable: Exception | None = None
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = find_tokenizer(model)
    except (BadInput, MissingExtra) as error:
        unusable = error
    save(model, out, format)
    n_bytes = bytes_in(out)
    loses = format == LLAMA2C and (model.bos_id, model.stop_ids) != (1, (1, 2))
    if tokenizer is None:
        return Exported(n_bytes, unusable=unusable, loses_special_ids=loses)
    folder = out.is_dir()
    try:
        if not folder:
            own = tokenizer.save(out.parent, f"{out.stem}.")
            if model.chat_template is not None:
                write_chat_template(out.parent, model.chat_template, f"{out.stem}.")
            return Exported(n_bytes, own, loses_special_ids=loses)
        own, further = tokenizer.save(out), None
        if isinstance(tokenizer, Llama2cTokenizer | BytesTokenizer):
            further = save_for_transformers(tokenizer, out)
        return Exported(n_bytes, own, further, loses_special_ids=loses)
    except BaseException:
        # neither OUT nor its own tokenizer was there before
        shutil.rmtree(out) if folder else out.unlink(missing_ok=True)
        for name in () if folder else _own_names(out):
            out.with_name(name).unlink(missing_ok=True)
        raise


def bytes_in(out: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = out.rglob("*") if out.is_dir() else [out]
    return sum(file.stat().st_size for file in files if file.is_file())


def _own_names(out: Path) -> list[str]:
    """What the files of OUT.bin's own tokenizer may be called."""
    settings = ("tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE_FILE)
    return [f"{out.stem}.{name}" for name in (*FILE_NAMES, *settings)]
