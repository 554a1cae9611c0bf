"""Find, load and check tokenizers.

There are three kinds: llama2.c's tokenizer.bin (a sentencepiece tokenizer.model is converted to
it), Hugging Face's tokenizer.json, and plain bytes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onelaunch.checkpoints import gguf_tokenizer
from onelaunch.checkpoints.atomic import read_bytes
from onelaunch.checkpoints.tokenizer_bytes import BytesTokenizer
from onelaunch.checkpoints.tokenizer_json import JsonTokenizer
from onelaunch.checkpoints.tokenizer_llama2c import (
    MAX_FILE_BYTES,
    Llama2cTokenizer,
    from_sentencepiece,
    train_llama2c,
)
from onelaunch.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.config import ModelConfig

__all__ = [
    "BytesTokenizer",
    "JsonTokenizer",
    "Llama2cTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "check_ids",
    "find_tokenizer",
    "from_sentencepiece",
    "load_tokenizer",
    "size_note",
    "train_llama2c",
]


class StreamDecoder(Protocol):
    """Decodes a stream of ids."""

    def push(self, token: int) -> str:
        """Add an id; returns the text that it completes, which may be empty."""

    def finish(self) -> str:
        """Return the remaining text, after the last id."""


class Tokenizer(Protocol):
    """Encodes text to token ids and decodes them.

    `bos_id` and `eos_id` are None if the tokenizer has none. `special_tokens` are the ids of its
    control tokens by their text. `fingerprint` is the SHA-256 of the content of the file (of the
    word "bytes" for bytes), `file_fingerprint` that of its bytes.
    `file_name` is the name that `save` writes, after a prefix.
    """

    kind: str
    file_name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, independent of the layout of the file."""

    @property
    def file_fingerprint(self) -> str:
        """SHA-256 of the bytes of the file."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text; with `bos`, after the BOS id if there is one."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode the ids of a whole text; ids outside the vocabulary are skipped."""

    def decoder(self) -> StreamDecoder:
        """Make a decoder for a stream of ids."""

    def piece(self, token: int) -> str:
        """Return the vocabulary entry of an id."""

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write the files of the tokenizer into a folder, atomically; returns the main path.

        All file names begin with `prefix`.
        """


FILE_NAMES = ("tokenizer.bin", "tokenizer.bytes", "tokenizer.json", "tokenizer.model")
"""File names of the kinds, in the order in which they are searched."""

# Unsupported vocabulary files; other tools convert them to a tokenizer.json.
_UNSUPPORTED = ("vocab.json", "vocab.txt", "tekken.json", "spiece.model", "*.tiktoken")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")
# The names of llama2.c's small tokenizers: tok512.bin.
_SIZED = re.compile(r"tok\d+\.bin")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load the tokenizer in a file or a folder, or the byte tokenizer for the word "bytes".

    Raises BadInput naming `spec` if there is none, or each unusable file with the reason;
    MissingExtra if only a library is not installed.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if not path.is_dir():
        return _load_file(path)
    errors: list[BadInput | MissingExtra] = []
    for file in _tokenizer_files(path):
        try:
            return _load_file(file)
        except (BadInput, MissingExtra) as error:
            errors.append(error)
    if errors:
        raise _combined(errors)
    raise BadInput(f"{path}: no tokenizer in this folder; looked for {', '.join(FILE_NAMES)}")


def _load_file(path: Path) -> Tokenizer:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise BadInput(f"{path}: a broken link") from error
        if isinstance(error, FileNotFoundError):
            raise BadInput(
                f"{path}: no such file; pass a tokenizer file, or the word bytes"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: cannot read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path}: not a file")
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    if path.suffix == ".gguf":
        tokenizer = gguf_tokenizer.read_tokenizer(path)
        if tokenizer is None:
            raise BadInput(f"{path}: has no tokenizer in it")
        return tokenizer
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".bytes":
        return BytesTokenizer()
    if path.suffix == ".model":
        return _read_sentencepiece(path)
    raise BadInput(
        f"{path}: a tokenizer is a llama2.c tokenizer.bin, a Hugging Face tokenizer.json, "
        "a sentencepiece tokenizer.model, a GGUF file with one in it, or the word bytes"
    )


def _read_sentencepiece(path: Path) -> Llama2cTokenizer:
    data = read_bytes(path, MAX_FILE_BYTES, "a sentencepiece model")
    if _TIKTOKEN.match(data):
        raise BadInput(f"{path}: a tiktoken vocabulary is not supported; use its tokenizer.json")
    return from_sentencepiece(data, path)


def find_tokenizer(model: LoadedModel) -> Tokenizer | None:
    """Find the tokenizer in the folder of a model; None if there is none.

    First NAME.tokenizer.bin (or .bytes, .json, .model) for NAME.bin, which `export` writes; then
    the one in a GGUF file; then `FILE_NAMES` and tok*.bin, the names of llama2.c's small ones. Of
    these the first with as many ids as the model has rows is returned; else the first of
    `FILE_NAMES` with fewer ids, as the vocabulary of a model may be padded; else with more.

    Raises BadInput naming each file with the reason, if there are files but none is usable;
    MissingExtra if only a library is not installed.
    """
    source = model.source
    if source is None:
        return None
    folder = source if source.is_dir() else source.parent
    if source != folder:
        own = _tokenizer_files(folder, f"{source.stem}.")
        if own:
            return _load_file(own[0])
    rows = model.config.vocab_size
    others: list[Tokenizer] = []
    errors: list[BadInput | MissingExtra] = []
    if model.format == "gguf":
        inside = gguf_tokenizer.read_tokenizer(source)
        if inside is not None:
            return inside
    for path in _tokenizer_files(folder):
        try:
            tokenizer = _load_file(path)
        except (BadInput, MissingExtra) as error:
            errors.append(error)
            continue
        if tokenizer.vocab_size == rows:
            return tokenizer
        others.append(tokenizer)
    sized = _sized_tokenizers(folder, source, rows, errors)
    if len(sized) == 1:
        return next(iter(sized.values()))
    if others:
        return min(others, key=lambda tokenizer: tokenizer.vocab_size > rows)
    if sized:
        names = " and ".join(path.name for path in sized)
        raise BadInput(f"{folder}: {names} all match the model's vocabulary; pass one of them")
    if source == folder and not errors:
        errors += [
            BadInput(f"{path}: unsupported tokenizer format; convert it to a tokenizer.json")
            for pattern in _UNSUPPORTED
            for path in sorted(folder.glob(pattern))
        ]
    if errors:
        raise _combined(errors)
    return None


def _tokenizer_files(folder: Path, prefix: str = "") -> list[Path]:
    """List the files in a folder with the name of a tokenizer, readable or not."""
    paths = [folder / (prefix + name) for name in FILE_NAMES]
    return [path for path in paths if os.path.lexists(path)]


def _sized_tokenizers(
    folder: Path, source: Path, rows: int, errors: list[BadInput | MissingExtra]
) -> dict[Path, Tokenizer]:
    """Load the tok*.bin files in a folder that have as many ids as the model has rows."""
    matching: dict[Path, Tokenizer] = {}
    for path in sorted(folder.glob("tok*.bin")):
        if path == source or path.name.endswith(FILE_NAMES):
            continue
        try:
            tokenizer = _load_file(path)
            if tokenizer.vocab_size != rows:
                raise BadInput(
                    f"{path}: has {tokenizer.vocab_size} tokens, the model {rows}; pass it "
                    "explicitly if it belongs to the model"
                )
            matching[path] = tokenizer
        except BadInput as error:
            if _SIZED.fullmatch(path.name):  # other names may be any file
                errors.append(error)
    return matching


def _combined(errors: list[BadInput | MissingExtra]) -> BadInput | MissingExtra:
    """Combine the errors of all files; MissingExtra only if all are."""
    if len(errors) == 1 or all(isinstance(error, MissingExtra) for error in errors):
        return errors[0]
    return BadInput("; ".join(map(str, errors)))


def size_note(tokenizer: Tokenizer, config: ModelConfig) -> str | None:
    """Return a warning for a tokenizer that is likely that of another model: more than a quarter
    larger than its vocabulary, or half the size or less. None for all others."""
    ids, rows = tokenizer.vocab_size, config.vocab_size
    if rows < 2 * ids and 4 * ids <= 5 * rows:
        return None
    return f"note: the tokenizer has {ids:,} tokens, the model {rows:,}: is it the right tokenizer?"


def check_ids(tokenizer: Tokenizer, ids: Iterable[int], config: ModelConfig, name: str) -> None:
    """Raise BadInput, naming the piece and `name`, for an id outside the model's vocabulary."""
    outside = next((i for i in ids if i >= config.vocab_size), None)
    if outside is not None:
        raise BadInput(
            f"{name}: {tokenizer.piece(outside)!r} is id {outside} of the tokenizer, outside the "
            f"model's vocabulary of {config.vocab_size}; use the model's own tokenizer"
        )
