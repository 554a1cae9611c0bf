"""A model with its tokenizer, from one format into another: all of it, or nothing.

In a Hugging Face folder the tokenizer has its usual name; beside OUT/NAME.bin it is
NAME.tokenizer.bin (or .bytes, .json): several models share a folder, and loading NAME.bin looks
for that name first; the chat template is chat_template.jinja or NAME.chat_template.jinja. A GGUF
file contains both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onelaunch.checkpoints import GGUF, INT8, save
from onelaunch.checkpoints.chat_template_files import CHAT_TEMPLATE_FILE, write_chat_template
from onelaunch.checkpoints.gguf_tokenizer_export import tokenizer_keys
from onelaunch.checkpoints.gguf_writer import lost_stop_ids, unquantized
from onelaunch.checkpoints.llama2c_versions import GROUP_SIZE, group_size
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
_SUFFIXES = {LLAMA2C: (".bin", "llama2.c"), INT8: (".bin", "llama2.c"), GGUF: (".gguf", "GGUF")}
"""The formats of one file, the names of their files, and of the formats."""


@dataclass(frozen=True)
class Exported:
    """The files of an exported model.

    n_bytes: of the model's own.
    tokenizer: the file that has the tokenizer; None where none was written.
    for_transformers: a further file that makes the tokenizer one of transformers.
    unusable: why the model's tokenizer was left out, where it could not be used.
    notes: what differs from the model, a line each.
    """

    n_bytes: int
    tokenizer: Path | None = None
    for_transformers: Path | None = None
    unusable: Exception | None = None
    notes: tuple[str, ...] = ()


def check_out(out: Path, format: str) -> None:
    """Raise BadInput where `out` exists, is not a name for the format, or has a file beside it that
    would be taken for its tokenizer."""
    if os.path.lexists(out):
        raise BadInput(f"{out}: exists already; nothing was written: choose another name")
    if format not in _SUFFIXES:
        return
    suffix, name = _SUFFIXES[format]
    if out.suffix != suffix:
        raise BadInput(f"{out}: a {name} file is known by its name: it must end in {suffix}")
    for name in _own_names(out):
        if os.path.lexists(out.with_name(name)):
            raise BadInput(
                f"{out.with_name(name)}: exists already, and would be taken for the tokenizer of "
                f"{out.name}; nothing was written: choose another name for it, or remove the file"
            )


def export(model: LoadedModel, out: Path, format: str, weights: str | None = None) -> Exported:
    """Write a model and its tokenizer, if it has one that can be used. Raises what `check_out` and
    `checkpoints.save` do; after an error nothing is left behind."""
    check_out(out, format)
    unusable: Exception | None = None
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = find_tokenizer(model)
        if format == GGUF:
            tokenizer_keys(tokenizer, model.config.vocab_size)
    except (BadInput, MissingExtra) as error:
        tokenizer, unusable = None, error
    save(model, out, format, weights, tokenizer)
    n_bytes = bytes_in(out)
    notes = tuple(_notes(model, format, weights))
    if tokenizer is None:
        return Exported(n_bytes, unusable=unusable, notes=notes)
    if format == GGUF:
        return Exported(n_bytes, out, notes=notes)
    folder = out.is_dir()
    try:
        if not folder:
            own = tokenizer.save(out.parent, f"{out.stem}.")
            if model.chat_template is not None:
                write_chat_template(out.parent, model.chat_template, f"{out.stem}.")
            return Exported(n_bytes, own, notes=notes)
        own, further = tokenizer.save(out), None
        if isinstance(tokenizer, Llama2cTokenizer | BytesTokenizer):
            further = save_for_transformers(tokenizer, out)
        return Exported(n_bytes, own, further, notes=notes)
    except BaseException:
        # neither OUT nor its own tokenizer was there before
        shutil.rmtree(out) if folder else out.unlink(missing_ok=True)
        for name in () if folder else _own_names(out):
            out.with_name(name).unlink(missing_ok=True)
        raise


def _notes(model: LoadedModel, format: str, weights: str | None) -> Iterator[str]:
    if format in (LLAMA2C, INT8) and (model.bos_id, model.stop_ids) != (1, (1, 2)):
        yield (
            f"note: a llama2.c file has no place for the special ids, and its readers take BOS 1 "
            f"and stop at 1 and 2; this model has BOS {model.bos_id} and stops at "
            f"{', '.join(map(str, model.stop_ids)) or 'none'}"
        )
    if format == INT8 and (group := group_size(model.config)) < GROUP_SIZE:
        yield (
            f"note: the weights are in groups of {group}, as rows of {model.config.dim} and "
            f"{model.config.hidden_dim} are not whole groups of {GROUP_SIZE}: each has a scale of "
            "four bytes"
        )
    if format == GGUF and (lost := lost_stop_ids(model)):
        yield (
            f"note: a GGUF file has room for three stop ids; not in it: {', '.join(map(str, lost))}"
        )
    if format == GGUF and (kept := unquantized(model, weights)):
        yield (
            f"note: {len(kept)} matrices, such as {kept[0]}, are in float16: their rows of "
            f"{model.weights[kept[0]].shape[-1]} are not whole blocks of {weights}"
        )


def bytes_in(out: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = out.rglob("*") if out.is_dir() else [out]
    return sum(file.stat().st_size for file in files if file.is_file())


def _own_names(out: Path) -> list[str]:
    """What the files of OUT.bin's own tokenizer may be called."""
    settings = ("tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE_FILE)
    return [f"{out.stem}.{name}" for name in (*FILE_NAMES, *settings)]
