"""Hugging Face's tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from onelaunch.checkpoints.atomic import atomic_file, read_json, write_json
from onelaunch.errors import BadInput, MissingExtra

# The largest on the Hub take about 33 MB; larger files are refused unread.
MAX_FILE_BYTES = 64 << 20
_SETTINGS_BYTES = 4 << 20

# A character is at most four bytes, a token at least one: more ids than this without a whole
# character are not text, and waiting longer would make each further id dearer.
_LONGEST_WAIT = 16

# No model of the Llama family has one. Where it does not fit a BPE's merges the library panics, and
# Rust writes a line of its own to standard error.
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')

_T = TypeVar("_T")


class JsonTokenizer:
    """A tokenizer.json and the special ids that the settings beside it name.

    `bos_id` begins a text, by the tokenizer's own template, or else by tokenizer_config.json, or
    config.json. `stop_ids` end one: the eos ids of generation_config.json or config.json, the
    eos_token of tokenizer_config.json, and `bos_id`. `eos_id` is that eos_token, or else the first
    of the eos ids. A file that stands alone may have none.
    """

    kind = "json"

    def __init__(self, path: Path | str) -> None:
        """Raises BadInput naming the file, MissingExtra without the tokenizers library."""
        path = Path(path)
        self._bytes = _read(path, MAX_FILE_BYTES)
        if _SUBWORD_PREFIX.search(self._bytes):
            raise BadInput(f"{path}: a model with a continuing_subword_prefix is not read here")
        self.fingerprint = hashlib.sha256(self._bytes).hexdigest()
        self._tokenizer = _guarded(lambda: _library().Tokenizer.from_buffer(self._bytes), path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        """One more than the largest id: some vocabularies have holes."""
        settings = path.with_name("tokenizer_config.json")
        self._settings = _read(settings, _SETTINGS_BYTES) if settings.is_file() else None
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._silent = {i for i, token in added if token.special}
        sample = _guarded(lambda: self._tokenizer.encode("a"), path)
        template = sample.ids[:1] if sample.special_tokens_mask[:1] == [1] else []
        self._adds_bos = bool(template)
        self.bos_id, self.eos_id, self.stop_ids = self._special_ids(path, template)

    def _special_ids(
        self, path: Path, template: list[int]
    ) -> tuple[int | None, int | None, tuple[int, ...]]:
        tables = {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            file = path.with_name(name)
            tables[name] = read_json(file, _SETTINGS_BYTES) if file.is_file() else {}

        def named(key: str) -> list[int]:
            token = tables["tokenizer_config.json"].get(key)
            token = token.get("content") if isinstance(token, dict) else token
            found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
            return [] if found is None else [found]

        def numbered(key: str) -> list[int]:
            for name in ("generation_config.json", "config.json"):
                value = tables[name].get(key)
                found = value if isinstance(value, list) else [value]
                whole = [i for i in found if type(i) is int and 0 <= i < self.vocab_size]
                if whole:
                    return whole
            return []

        bos = (template or named("bos_token") or numbered("bos_token_id"))[:1]
        eos = [*named("eos_token"), *numbered("eos_token_id")]
        stops = tuple(sorted({*bos, *eos}))
        return (bos[0] if bos else None), (eos[0] if eos else None), stops

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text. As in transformers, `bos` adds the begin-of-text id only where the
        tokenizer's own template has one, or where there is no text; `bos_id` tells it always.

        Raises BadInput for text that is not Unicode, or that the tokenizer cannot take.
        """
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"the text is not valid Unicode: {error.reason}") from None
        ids = _guarded(
            lambda: self._tokenizer.encode(text, add_special_tokens=False).ids, "the text"
        )
        return [*begin, *ids] if self._adds_bos or not ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special tokens are silent; so are ids beyond the vocabulary, which a
        model may have for padding. Bytes that are not UTF-8 become U+FFFD."""
        spoken = [i for i in ids if self._speaks(i)]
        return _guarded(lambda: str(self._tokenizer.decode(spoken)), "the ids")

    def decoder(self) -> _JsonStream:
        """Decodes id by id."""
        return _JsonStream(self.decode, self._speaks)

    def _speaks(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self._silent

    def save(self, folder: Path | str) -> Path:
        """Write `tokenizer.json` into a folder, atomically; returns its path.

        The tokenizer_config.json found beside it comes along, and a generation_config.json with
        the special ids, unless the folder has one: read from there, the ids are the same.
        """
        path = Path(folder) / "tokenizer.json"
        if self._settings is not None:
            with atomic_file(path.with_name("tokenizer_config.json")) as file:
                file.write(self._settings)
        generation = path.with_name("generation_config.json")
        if self.stop_ids and not generation.exists():
            # the first of them is `eos_id` again
            stops = sorted(self.stop_ids, key=lambda stop: stop != self.eos_id)
            ids = {"bos_token_id": self.bos_id, "eos_token_id": stops}
            write_json(generation, ids)
        with atomic_file(path) as file:
            file.write(self._bytes)
        return path


class _JsonStream:
    """Decodes a short window again at each id: what an id adds to a text depends on those before
    it (a leading space, half a character)."""

    def __init__(self, decode: Callable[[list[int]], str], speaks: Callable[[int], bool]) -> None:
        self._decode = decode
        self._speaks = speaks
        self._window: list[int] = []  # the ids of the last text given out, then those withheld
        self._given = 0  # how many of them have been given out

    def push(self, token: int) -> str:
        """The text that this id completes, which may be empty."""
        if not self._speaks(token):
            return ""
        self._window.append(token)
        text = self._new_text()
        incomplete = text.endswith("\ufffd") and len(self._window) - self._given < _LONGEST_WAIT
        if not text or incomplete:
            return ""
        del self._window[: self._given]
        self._given = len(self._window)
        return text

    def finish(self) -> str:
        """The rest, once no id follows."""
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._given])) :]


def _read(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    if len(data) > limit:
        raise BadInput(f"{path}: larger than {limit} bytes; this is not a tokenizer")
    return data


def _guarded(call: Callable[[], _T], subject: Path | str) -> _T:
    """Run a library call; its errors, a Rust panic among them, become BadInput."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MissingExtra):
        raise
    except BaseException as error:  # pyo3's PanicException is no Exception
        raise BadInput(
            f"{subject}: not a usable tokenizer.json or input for one ({error})"
        ) from error


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenizers", "hf", "reading a tokenizer.json") from None
    return tokenizers
