"""Tokenizers: which kinds there are, where one is found, whether a text fits the model.

Three kinds: llama2.c's tokenizer.bin, which sentencepiece's tokenizer.model is read as, Hugging
Face's tokenizer.json, and plain bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onelaunch.checkpoints.atomic import read_bytes, write_text
from onelaunch.checkpoints.tokenizer_json import JsonTokenizer
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_BYTE,
    FIRST_PIECE,
    MAX_FILE_BYTES,
    Llama2cTokenizer,
    Utf8Stream,
    from_sentencepiece,
    train_llama2c,
    utf8_bytes,
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
    """Text from ids that arrive one by one."""

    def push(self, token: int) -> str:
        """The text that this id completes, which may be empty."""

    def finish(self) -> str:
        """The rest, once no id follows."""


class Tokenizer(Protocol):
    """Text to ids and back.

    `bos_id` begins a text and `eos_id` ends one, each None where the tokenizer names none.
    `fingerprint` is the SHA-256 of what the file says (of "bytes" for bytes), `file_fingerprint`
    that of its bytes. `file_name` is what `save` calls the file, after a prefix.
    """

    kind: str
    file_name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Identifies the tokenizer, however its file is laid out."""

    @property
    def file_fingerprint(self) -> str:
        """Identifies the file."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, after the begin-of-text id where there is one and `bos` holds."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, taken as a whole text; ids beyond the vocabulary are silent."""

    def decoder(self) -> StreamDecoder:
        """Decodes id by id."""

    def piece(self, token: int) -> str:
        """The name of an id of the vocabulary."""

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write the tokenizer's files into a folder, atomically; returns the path of the main one.

        Their names begin with `prefix`.
        """


FILE_NAMES = ("tokenizer.bin", "tokenizer.bytes", "tokenizer.json", "tokenizer.model")
"""What each kind's file is called, in the order in which they are looked for."""

# Vocabularies that come without one of those; other tools make a tokenizer.json of them.
_OTHER_KINDS = ("vocab.json", "vocab.txt", "tekken.json", "spiece.model", "*.tiktoken")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")
# As llama2.c names its small ones: tok512.bin.
_SIZED = re.compile(r"tok\d+\.bin")


class BytesTokenizer:
    """A token is a byte: id = byte + 3, as in llama2.c's vocabularies; 1 begins and 2 ends."""

    kind = "bytes"
    file_name = "tokenizer.bytes"
    vocab_size = FIRST_PIECE
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (1, 2)
    fingerprint = file_fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """One id per UTF-8 byte."""
        ids = [FIRST_BYTE + byte for byte in utf8_bytes(text)]
        return [1, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; 0, 1, 2 and those above 258 are silent."""
        stream = self.decoder()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decoder(self) -> Utf8Stream:
        """Decodes id by id."""
        return Utf8Stream(_byte, 1)

    def piece(self, token: int) -> str:
        """An id's byte, as "<0x41>"."""
        return f"<0x{token - FIRST_BYTE:02X}>" if token >= FIRST_BYTE else f"<{token}>"

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.bytes`, `prefix` before its name, a file that holds the word."""
        path = Path(folder) / (prefix + self.file_name)
        write_text(path, "bytes")
        return path


def _byte(token: int, first: bool) -> bytes:
    return bytes([token - FIRST_BYTE]) if FIRST_BYTE <= token < FIRST_PIECE else b""


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer in a file, in a folder that holds one, or by the word "bytes".

    Raises BadInput naming `spec` where there is none, or each file that cannot be used and why;
    MissingExtra where only its library is not installed.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if not path.is_dir():
        return _load_file(path)
    errors: list[BadInput | MissingExtra] = []
    for file in _named_in(path):
        try:
            return _load_file(file)
        except (BadInput, MissingExtra) as error:
            errors.append(error)
    if errors:
        raise _one_of(errors)
    raise BadInput(f"{path}: this folder holds no {', '.join(FILE_NAMES)}")


def _load_file(path: Path) -> Tokenizer:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise BadInput(f"{path}: a link to a file that is not there") from error
        if isinstance(error, FileNotFoundError):
            raise BadInput(f"{path}: no such tokenizer file (or the word bytes)") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: cannot read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path}: not a file")
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".bytes":
        return BytesTokenizer()
    if path.suffix == ".model":
        return _read_sentencepiece(path)
    raise BadInput(
        f"{path}: a tokenizer is a llama2.c tokenizer.bin, a Hugging Face tokenizer.json, "
        "a sentencepiece tokenizer.model, or the word bytes"
    )


def _read_sentencepiece(path: Path) -> Llama2cTokenizer:
    data = read_bytes(path, MAX_FILE_BYTES, "a sentencepiece model")
    if _TIKTOKEN.match(data):
        raise BadInput(f"{path}: a tiktoken vocabulary is not read; take its tokenizer.json")
    return from_sentencepiece(data, path)


def find_tokenizer(model: LoadedModel) -> Tokenizer | None:
    """The tokenizer beside a model's file, or in its folder; None where no tokenizer lies there.

    First NAME.tokenizer.bin (or .bytes, .json, .model) beside NAME.bin, as `export` writes it; then
    `FILE_NAMES` and tok*.bin, as llama2.c names its small ones. Of these the first of as many ids
    as the model has rows is taken; else the first of `FILE_NAMES` of fewer ids, as a model's
    vocabulary may be padded; else of more.

    Raises BadInput naming each file that lies there and why it cannot be used, where none can;
    MissingExtra where only a library is not installed.
    """
    source = model.source
    if source is None:
        return None
    folder = source if source.is_dir() else source.parent
    if source != folder:
        own = _named_in(folder, f"{source.stem}.")
        if own:
            return _load_file(own[0])
    rows = model.config.vocab_size
    others: list[Tokenizer] = []
    errors: list[BadInput | MissingExtra] = []
    for path in _named_in(folder):
        try:
            found = _load_file(path)
        except (BadInput, MissingExtra) as error:
            errors.append(error)
            continue
        if found.vocab_size == rows:
            return found
        others.append(found)
    sized = _sized_in(folder, source, rows, errors)
    if len(sized) == 1:
        return next(iter(sized.values()))
    if others:
        return min(others, key=lambda found: found.vocab_size > rows)
    if sized:
        names = " and ".join(path.name for path in sized)
        raise BadInput(f"{folder}: {names} have as many tokens as the model: name one of them")
    if source == folder and not errors:
        errors += [
            BadInput(f"{path}: a tokenizer of a kind that is not read; make a tokenizer.json of it")
            for pattern in _OTHER_KINDS
            for path in sorted(folder.glob(pattern))
        ]
    if errors:
        raise _one_of(errors)
    return None


def _named_in(folder: Path, prefix: str = "") -> list[Path]:
    """What lies in a folder under a tokenizer's name, readable or not."""
    paths = [folder / (prefix + name) for name in FILE_NAMES]
    return [path for path in paths if os.path.lexists(path)]


def _sized_in(
    folder: Path, source: Path, rows: int, errors: list[BadInput | MissingExtra]
) -> dict[Path, Tokenizer]:
    """The tok*.bin in a folder that have as many tokens as the model has rows."""
    fitting: dict[Path, Tokenizer] = {}
    for path in sorted(folder.glob("tok*.bin")):
        if path == source or path.name.endswith(FILE_NAMES):
            continue
        try:
            found = _load_file(path)
            if found.vocab_size != rows:
                raise BadInput(
                    f"{path}: has {found.vocab_size} tokens and the model {rows}: name it if it "
                    "is the model's own"
                )
            fitting[path] = found
        except BadInput as error:
            if _SIZED.fullmatch(path.name):  # others may be anything
                errors.append(error)
    return fitting


def _one_of(errors: list[BadInput | MissingExtra]) -> BadInput | MissingExtra:
    """One error for all files that cannot be used: a missing library's only where that is all."""
    if len(errors) == 1 or all(isinstance(error, MissingExtra) for error in errors):
        return errors[0]
    return BadInput("; ".join(map(str, errors)))


def size_note(tokenizer: Tokenizer, config: ModelConfig) -> str | None:
    """A line for a tokenizer that is likely another model's: more than a quarter larger, or half
    the size or less. None for all others."""
    ids, rows = tokenizer.vocab_size, config.vocab_size
    if rows < 2 * ids and 4 * ids <= 5 * rows:
        return None
    return f"note: the tokenizer has {ids:,} tokens, the model {rows:,}: is it the model's own?"


def check_ids(tokenizer: Tokenizer, ids: Iterable[int], config: ModelConfig, name: str) -> None:
    """Raise BadInput, naming the piece and `name`, for an id that the model has no row for."""
    beyond = next((i for i in ids if i >= config.vocab_size), None)
    if beyond is not None:
        raise BadInput(
            f"{name}: {tokenizer.piece(beyond)!r} is id {beyond} of the tokenizer, beyond the "
            f"model's vocabulary of {config.vocab_size}; is this the model's own tokenizer?"
        )
