"""manifest.json of a folder of prepared tokens. Pure data, validated field by field."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import read_json
from onelaunch.config import MAX_EXTENT
from onelaunch.errors import BadInput

MANIFEST_FILE = "manifest.json"
SCHEMA = 1
SPLITS = ("train", "val")

# Larger vocabularies are stored in four bytes per token.
MAX_UINT16_VOCAB = 65_535
ITEM_BYTES = {"uint16": 2, "uint32": 4}

_MAX_COUNT = 1 << 60
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def dtype_for(vocab_size: int) -> str:
    """Return the dtype of tokens: uint16, or uint32 for vocabularies above 65,535."""
    return "uint16" if vocab_size <= MAX_UINT16_VOCAB else "uint32"


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """A token file: the number of tokens, and of the UTF-8 bytes and documents they encode."""

    file: str
    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The tokenizer of the tokens; in older manifests `fingerprint` is its `file_fingerprint`."""

    kind: str
    file: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A text file that was tokenized."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json. Documents begin with `bos_id`, or if that is None end with
    `eos_id`; if both are None, they have no separator."""

    dtype: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    tokenizer: TokenizerFacts
    synthetic: bool
    splits: dict[str, SplitFacts]
    sources: tuple[SourceFacts, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON data; `read` is the inverse."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def read(cls, folder: Path | str) -> Manifest:
        """Read a folder's manifest; raises BadInput naming the file and the field.

        File names must have no folder: a manifest cannot name files outside its folder. The files
        themselves are not checked.
        """
        path = Path(folder) / MANIFEST_FILE
        table = _Table(read_json(path), str(path))
        if (schema := table.count("schema", 1 << 30)) != SCHEMA:
            raise BadInput(
                f"{path}: schema {schema} is not supported, only {SCHEMA}; "
                "run `onelaunch prepare` again"
            )
        vocab_size = table.count("vocab_size", MAX_EXTENT, minimum=1)
        dtype = table.text("dtype")
        if dtype != dtype_for(vocab_size):
            raise BadInput(
                f"{path}: dtype {dtype[:20]!r}: must be {dtype_for(vocab_size)} for vocabulary "
                f"size {vocab_size}"
            )
        tokenizer = table.table("tokenizer")
        splits = table.table("splits")
        return cls(
            dtype=dtype,
            vocab_size=vocab_size,
            bos_id=table.id("bos_id", vocab_size),
            # older manifests, without documents that end with EOS, lack it
            eos_id=table.id("eos_id", vocab_size) if "eos_id" in table else None,
            tokenizer=TokenizerFacts(
                kind=tokenizer.text("kind"),
                file=tokenizer.text("file", _FILE_NAME, "a plain file name"),
                fingerprint=tokenizer.text("fingerprint", _SHA256, "a SHA-256"),
            ),
            synthetic=table.flag("synthetic"),
            splits={name: _split(splits.table(name)) for name in SPLITS},
            sources=tuple(
                SourceFacts(source.text("file"), source.count("bytes"), source.sha256())
                for source in table.tables("sources")
            ),
        )


def _split(table: _Table) -> SplitFacts:
    return SplitFacts(
        file=table.text("file", _FILE_NAME, "a plain file name"),
        tokens=table.count("tokens"),
        bytes=table.count("bytes"),
        documents=table.count("documents"),
        sha256=table.sha256(),
    )


class _Table:
    """A JSON object whose fields are validated when read."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise BadInput(f"{where}: must be a JSON object")
        self._data = data
        self._where = where

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def _bad(self, key: str, needed: str) -> BadInput:
        return BadInput(
            f"{self._where}: {key} must be {needed}, not {repr(self._data[key])[:60]}; "
            "run `onelaunch prepare` again"
        )

    def get(self, key: str) -> Any:
        if key not in self._data:
            raise BadInput(f"{self._where}: {key} is missing; run `onelaunch prepare` again")
        return self._data[key]

    def text(self, key: str, pattern: re.Pattern[str] | None = None, needed: str = "") -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self._bad(key, needed or "a string")
        if pattern is not None and not pattern.fullmatch(value):
            raise self._bad(key, needed)
        return value

    def sha256(self) -> str:
        return self.text("sha256", _SHA256, "a SHA-256")

    def count(self, key: str, maximum: int = _MAX_COUNT, minimum: int = 0) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._bad(key, f"a whole number from {minimum} to {maximum}")
        return value

    def id(self, key: str, vocab_size: int) -> int | None:
        return None if self.get(key) is None else self.count(key, vocab_size - 1)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.get(key), f"{self._where}: {key}")

    def tables(self, key: str) -> list[_Table]:
        values = self.get(key)
        if not isinstance(values, list):
            raise self._bad(key, "a list")
        return [_Table(value, f"{self._where}: {key}") for value in values]
