"""Tokenizers of Hugging Face's tokenizer.json, by the `tokenizers` library."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from os.path import lexists
from pathlib import Path
from typing import Any, TypeVar

from onelaunch.checkpoints.atomic import atomic_file, read_bytes, read_json, write_json
from onelaunch.checkpoints.foreign_stderr import without_stderr
from onelaunch.checkpoints.tokenizer_growth import check_growth
from onelaunch.errors import BadInput, MissingExtra

FILE_NAME = "tokenizer.json"

# The largest on the Hub have about 33 MB; larger files are refused unread. Lists and tables cost
# memory in Python: real files have one per merge, half a million.
MAX_FILE_BYTES = 64 << 20
_MAX_BRACKETS = 4 << 20
_SETTINGS_BYTES = 4 << 20
# tokenizer_config.json may name tokens that the file lacks; special tokens are short.
_LONGEST_TOKEN = 1024

# A character has at most four bytes, a token at least one: more ids than this without a complete
# character are not text, and a longer window would make every further id slower.
_MAX_WINDOW = 16

_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

_T = TypeVar("_T")


class JsonTokenizer:
    """A tokenizer.json with the special tokens of the configuration files in its folder.

    Special tokens that only tokenizer_config.json names (added_tokens_decoder, bos_token, eos_token
    and so on) count as if the file had them. `bos_id` is that of the tokenizer's template, or else
    of tokenizer_config.json or config.json. `stop_ids` are the eos ids of generation_config.json or
    config.json, the eos_token of tokenizer_config.json, and `bos_id`. `eos_id` is that eos_token,
    or else the first of the eos ids. Without configuration files there may be none. Those of
    NAME.tokenizer.json are NAME.tokenizer_config.json, NAME.generation_config.json and
    NAME.config.json.
    """

    kind = "json"
    file_name = FILE_NAME

    def __init__(self, path: Path | str) -> None:
        """Raises BadInput naming the file, MissingExtra without the tokenizers library."""
        path = Path(path)
        self._bytes = _read(path, MAX_FILE_BYTES)
        data = _parse(self._bytes, path)
        model = data.get("model")
        if isinstance(model, dict) and model.get("continuing_subword_prefix"):
            # No Llama-family model has one; the library panics if the merges do not match it.
            raise BadInput(f"{path}: continuing_subword_prefix is not supported")
        check_growth(data, path)
        own = path.name.endswith(f".{FILE_NAME}")
        prefix = path.name.removesuffix(FILE_NAME) if own else ""
        settings = path.with_name(f"{prefix}tokenizer_config.json")
        self._settings = _read(settings, _SETTINGS_BYTES) if lexists(settings) else None
        tables = {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            file = path.with_name(prefix + name)
            tables[name] = read_json(file, _SETTINGS_BYTES) if lexists(file) else {}
        _library(path)
        _guarded(lambda: self._build(data, tables), path)

    @classmethod
    def from_definition(
        cls, data: dict[str, Any], special_ids: dict[str, Any], source: Path | str
    ) -> JsonTokenizer:
        """Make one of the content of a tokenizer.json; `special_ids` are the bos_token_id and
        eos_token_id of a generation_config.json. Raises what reading a file does, and names
        `source`."""
        self = cls.__new__(cls)
        self._bytes = json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._settings = None
        check_growth(data, Path(source))
        tables = {"tokenizer_config.json": {}, "generation_config.json": special_ids}
        _library(source)
        _guarded(lambda: self._build(data, {**tables, "config.json": {}}), source)
        return self

    def _build(self, data: dict[str, Any], tables: dict[str, dict[str, Any]]) -> None:
        self._tokenizer = _library().Tokenizer.from_buffer(self._bytes)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = tables["tokenizer_config.json"]
        self._config_tokens = self._add_config_tokens(settings)
        """(id, content) of the special tokens that tokenizer_config.json adds to the file."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._skipped = {i for i, token in added if token.special} | dict(
            self._config_tokens
        ).keys()
        self.special_tokens: Mapping[str, int] = {
            token.content: i for i, token in added if token.special
        } | {content: i for i, content in self._config_tokens}
        ids = [*(i for i, _ in added), *dict(self._config_tokens)]
        self.vocab_size = max(_largest_id(data["model"]), *ids, -1) + 1
        """The largest id plus one: some vocabularies have gaps."""
        sample = self._tokenizer.encode("a")
        template = sample.ids[:1] if sample.special_tokens_mask[:1] == [1] else []
        self.adds_bos = bool(template)
        """Whether `encode` adds BOS to a text that is not empty."""
        self.bos_id, self.eos_id, self.stop_ids = self._special_ids(tables, template)

    def _add_config_tokens(self, settings: dict[str, Any]) -> list[tuple[int, str]]:
        """Add tokens that only tokenizer_config.json names, as transformers does; returns (id,
        content) of the special ones.

        The library assigns the ids of new tokens. A token that would get another id than the
        settings say is not added: its id is skipped in decoding, but no text encodes to it.
        """
        tokens = self._tokenizer
        added = tokens.get_added_tokens_decoder()
        special = {token.content: token.special for token in added.values()}
        next_id = max(tokens.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added), 0)
        special_ids: dict[str, int] = {}
        new_tokens: list[tuple[bool, str, dict[str, bool]]] = []
        for number, content, is_special, flags in _config_tokens(settings):
            existing = tokens.token_to_id(content)
            number = existing if number is None else number
            if number is None or special.get(content) in (True, is_special):
                continue
            if existing not in (None, number) or tokens.id_to_token(number) not in (None, content):
                continue  # the content or the id is taken
            special[content] = is_special
            if existing is not None or number == next_id:
                new_tokens.append((is_special, content, flags))
                next_id = max(next_id, number + 1)
            if is_special:
                special_ids[content] = number
        for is_special, entries in groupby(new_tokens, key=lambda entry: entry[0]):
            added = [_library().AddedToken(text, normalized=False, **f) for _, text, f in entries]
            (tokens.add_special_tokens if is_special else tokens.add_tokens)(added)
        return [(number, content) for content, number in special_ids.items()]

    def _special_ids(
        self, tables: dict[str, dict[str, Any]], template: list[int]
    ) -> tuple[int | None, int | None, tuple[int, ...]]:
        extra = {content: i for i, content in self._config_tokens}

        def by_content(key: str) -> list[int]:
            token = _content(tables["tokenizer_config.json"].get(key))
            token_id = None if token is None else self._tokenizer.token_to_id(token)
            token_id = extra.get(token or "") if token_id is None else token_id
            return [] if token_id is None else [token_id]

        def by_id(key: str) -> list[int]:
            for name in ("generation_config.json", "config.json"):
                value = tables[name].get(key)
                values = value if isinstance(value, list) else [value]
                ids = [i for i in values if type(i) is int and 0 <= i < self.vocab_size]
                if ids:
                    return ids
            return []

        bos = (template or by_content("bos_token") or by_id("bos_token_id"))[:1]
        eos = [*by_content("eos_token"), *by_id("eos_token_id")]
        stops = tuple(sorted({*bos, *eos}))
        return (bos[0] if bos else None), (eos[0] if eos else None), stops

    def definition(self) -> dict[str, Any]:
        """Return the content of the file."""
        return dict(json.loads(self._bytes))

    def entries(self) -> list[tuple[str, str]]:
        """Return the content and kind of each id: "normal", "special", "added" (matched as a whole,
        but not special), or "none" for a gap."""
        content: dict[int, tuple[str, str]] = {
            i: (text, "normal")
            for text, i in self._tokenizer.get_vocab(with_added_tokens=False).items()
        }
        content |= {i: (text, "special") for i, text in self._config_tokens}
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            content[i] = (token.content, "special" if token.special else "added")
        return [content.get(i, ("", "none")) for i in range(self.vocab_size)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content of the file and of the tokens of tokenizer_config.json.

        White space, the order of keys, truncation and padding do not count."""
        data = json.loads(self._bytes)
        for name in ("version", "truncation", "padding"):
            data.pop(name, None)
        merges = data["model"].get("merges")
        if isinstance(merges, list):  # strings "a b" in older files
            data["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
        if self._config_tokens:
            data["more_tokens"] = sorted(self._config_tokens)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def file_fingerprint(self) -> str:
        """SHA-256 of the bytes of the file, which older manifests have."""
        return hashlib.sha256(self._bytes).hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text. As in transformers, `bos` adds the BOS id only if the template has one, or
        if the text is empty; `bos_id` has it in any case.

        Raises BadInput for text that is not Unicode, or that the tokenizer cannot encode.
        """
        begin = [self.bos_id] if bos and self.bos_id is not None else []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"the text is not valid Unicode: {error.reason}") from None
        ids = _guarded(
            lambda: self._tokenizer.encode(text, add_special_tokens=False).ids, "the text"
        )
        return [*begin, *ids] if self.adds_bos or not ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids. Special tokens are skipped, and ids outside the vocabulary, the padding of
        some models. Bytes that are not UTF-8 become U+FFFD."""
        visible = [i for i in ids if self._is_visible(i)]
        return _guarded(lambda: self._decode(visible), "the ids")

    def _decode(self, visible: list[int]) -> str:
        return str(self._tokenizer.decode(visible))

    def decoder(self) -> _JsonStream:
        """Make a decoder for a stream of ids."""
        return _JsonStream(self._decode, self._is_visible)

    def piece(self, token: int) -> str:
        """Return the vocabulary entry of an id; "" if it has none."""
        return str(self._tokenizer.id_to_token(token) or dict(self._config_tokens).get(token, ""))

    def _is_visible(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self._skipped

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.json` into a folder, atomically; returns its path.

        Also writes the tokenizer_config.json that was read with it, and a generation_config.json
        with the special ids unless the folder has one, so that loading gives the same ids. All
        file names begin with `prefix`.
        """
        path = Path(folder) / (prefix + FILE_NAME)
        if self._settings is not None:
            with atomic_file(path.with_name(prefix + "tokenizer_config.json")) as file:
                file.write(self._settings)
        generation = path.with_name(prefix + "generation_config.json")
        if self.stop_ids and not generation.exists():
            # loading takes the first as `eos_id`
            stops = sorted(self.stop_ids, key=lambda stop: stop != self.eos_id)
            ids = {"bos_token_id": self.bos_id, "eos_token_id": stops}
            write_json(generation, ids)
        with atomic_file(path) as file:
            file.write(self._bytes)
        return path


class _JsonStream:
    """A streaming decoder. It decodes a short window again at each id, as the text of an id depends
    on those before it (a leading space, half a character)."""

    def __init__(
        self, decode: Callable[[list[int]], str], is_visible: Callable[[int], bool]
    ) -> None:
        self._decode = decode
        self._is_visible = is_visible
        self._window: list[int] = []  # the ids of the last emitted text, then pending ids
        self._emitted = 0  # how many of them are emitted

    def push(self, token: int) -> str:
        """Add an id; returns the text that it completes, which may be empty."""
        if not self._is_visible(token):
            return ""
        self._window.append(token)
        text = _guarded(self._new_text, "the ids")
        incomplete = text.endswith("\ufffd") and len(self._window) - self._emitted < _MAX_WINDOW
        if not text or incomplete:
            return ""
        del self._window[: self._emitted]
        self._emitted = len(self._window)
        return text

    def finish(self) -> str:
        """Return the remaining text, after the last id."""
        return _guarded(self._new_text, "the ids")

    def _new_text(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._emitted])) :]


def _read(path: Path, limit: int) -> bytes:
    return read_bytes(path, limit, "a tokenizer").removeprefix(codecs.BOM_UTF8)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
        raise BadInput(f"{path}: more than {_MAX_BRACKETS} lists; this is not a tokenizer")
    try:
        data = json.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise BadInput(f"{path}: not a usable tokenizer.json: nested too deep") from error
    except ValueError as error:
        raise BadInput(f"{path}: truncated or damaged: not valid JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise BadInput(f"{path}: not a tokenizer.json: no model in it")
    return data


def _largest_id(model: dict[str, Any]) -> int:
    """Return the largest id of a model that the library has loaded."""
    vocab = model.get("vocab")
    return max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab or ()) - 1


def _content(token: Any) -> str | None:
    """Return the text of a token of tokenizer_config.json, a string or a table."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and 0 < len(text) <= _LONGEST_TOKEN else None


def _config_tokens(
    settings: dict[str, Any],
) -> Iterator[tuple[int | None, str, bool, dict[str, bool]]]:
    """Yield (id, content, whether it is special, flags) of each token that tokenizer_config.json
    names; the id is None for those it names without one."""
    table = settings.get("added_tokens_decoder")
    entries = table.items() if isinstance(table, dict) else ()
    for key, token in sorted(entries, key=lambda entry: (len(entry[0]), entry[0])):
        content = _content(token)
        if content is not None and re.fullmatch(r"[0-9]{1,9}", key):
            token = token if isinstance(token, dict) else {}
            flags = {flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
            yield int(key), content, bool(token.get("special")), flags
    for name in _SPECIAL_KEYS:
        content = _content(settings.get(name))
        if content is not None:
            yield None, content, True, {}


def _guarded(call: Callable[[], _T], subject: Path | str) -> _T:
    """Run a library call; its errors, Rust panics included, become BadInput.

    What it prints to stderr before an error is dropped."""
    try:
        return without_stderr(call)
    except BaseException as error:
        # pyo3's PanicException is not an Exception; interrupts and signals pass through
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise BadInput(
            f"{subject}: not a usable tokenizer.json, or not valid input ({error})"
        ) from error


def _library(path: Path | str = FILE_NAME) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenizers", "hf", f"reading {path}") from None
    return tokenizers
