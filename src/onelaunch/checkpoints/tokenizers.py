"""Tokenizers: which kinds there are, where one is found, whether it fits the model.

Three kinds: llama2.c's tokenizer.bin, Hugging Face's tokenizer.json, and plain bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onelaunch.checkpoints.atomic import write_text
from onelaunch.checkpoints.tokenizer_json import JsonTokenizer
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_BYTE,
    FIRST_PIECE,
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
    "check_tokenizer",
    "find_tokenizer",
    "from_sentencepiece",
    "load_tokenizer",
    "train_llama2c",
]


class StreamDecoder(Protocol):
    """Text from ids that arrive one by one."""

    def push(self, token: int) -> str:
        """The text that this id completes, which may be empty."""

    def finish(self) -> str:
        """The rest, once no id follows."""


class Tokenizer(Protocol):
    """Text to ids and back. `fingerprint` is the SHA-256 of the file (of "bytes" for bytes).

    `bos_id` begins a text and `eos_id` ends one, each None where the tokenizer names none.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    fingerprint: str

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, after the begin-of-text id where there is one and `bos` holds."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, taken as a whole text."""

    def decoder(self) -> StreamDecoder:
        """Decodes id by id."""

    def save(self, folder: Path | str) -> Path:
        """Write the tokenizer's file into a folder, atomically; returns its path."""


FILE_NAMES = ("tokenizer.bin", "tokenizer.bytes", "tokenizer.json")
"""What each kind's file is called, in the order in which they are looked for."""


class BytesTokenizer:
    """A token is a byte: id = byte + 3, as in llama2.c's vocabularies; 1 begins and 2 ends."""

    kind = "bytes"
    vocab_size = FIRST_PIECE
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (1, 2)
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """One id per UTF-8 byte."""
        ids = [FIRST_BYTE + byte for byte in utf8_bytes(text)]
        return [1, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; 0, 1 and 2 are silent. Raises BadInput for an id above 258."""
        stream = self.decoder()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decoder(self) -> Utf8Stream:
        """Decodes id by id."""
        return Utf8Stream(_byte, 1)

    def save(self, folder: Path | str) -> Path:
        """Write `tokenizer.bytes`, a file that holds the word."""
        path = Path(folder) / "tokenizer.bytes"
        write_text(path, "bytes")
        return path


def _byte(token: int, first: bool) -> bytes:
    if not 0 <= token < FIRST_PIECE:
        raise BadInput(f"token id {token} is beyond the byte tokenizer's vocabulary of 259")
    return bytes([token - FIRST_BYTE]) if token >= FIRST_BYTE else b""


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer in a file, in a folder that holds one, or by the word "bytes".

    Raises BadInput naming `spec` where there is none or it is damaged, MissingExtra where its
    library is not installed.
    """
    if spec == "bytes":
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise BadInput(f"{path}: this folder holds no {', '.join(FILE_NAMES)}")
    if not path.exists():
        raise BadInput(f"{path}: no such tokenizer file (or the word bytes)")
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    if path.suffix == ".json":
        return JsonTokenizer(path)
    if path.suffix == ".bytes":
        return BytesTokenizer()
    raise BadInput(
        f"{path}: a tokenizer is a llama2.c tokenizer.bin, a Hugging Face tokenizer.json, "
        "or the word bytes"
    )


def find_tokenizer(model: LoadedModel) -> Tokenizer | None:
    """The tokenizer beside a model's file, or in its folder, if there is one that fits.

    Looks for `FILE_NAMES`, then for one fitting tok*.bin, as llama2.c names its small ones. Files
    that do not fit or cannot be read are passed over. Raises MissingExtra where a tokenizer.json
    is all there is and its library is not installed.
    """
    if model.source is None:
        return None
    folder = model.source if model.source.is_dir() else model.source.parent
    for name in FILE_NAMES:
        if (found := _fitting(folder / name, model)) is not None:
            return found
    others = sorted(path for path in folder.glob("tok*.bin") if path.name not in FILE_NAMES)
    fitting = [found for path in others if (found := _fitting(path, model)) is not None]
    return fitting[0] if len(fitting) == 1 else None


def _fitting(path: Path, model: LoadedModel) -> Tokenizer | None:
    if not path.is_file():
        return None
    try:
        tokenizer = load_tokenizer(path)
        check_tokenizer(tokenizer, model.config, path)
    except MissingExtra:
        raise
    except BadInput:
        return None
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, source: Path | str) -> None:
    """Raise BadInput, naming `source`, where the tokenizer cannot be the model's.

    A tokenizer.json may have fewer ids than the model, whose vocabulary is often padded.
    """
    ours, theirs = tokenizer.vocab_size, config.vocab_size
    if ours == theirs or (tokenizer.kind == "json" and ours < theirs):
        return
    raise BadInput(
        f"{source}: wrong tokenizer: it has {ours} tokens and the model {theirs}; "
        "give the model's own with --tokenizer FILE"
    )
