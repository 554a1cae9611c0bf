"""Hugging Face's tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import groupby
from os.path import lexists
from pathlib import Path
from typing import Any, TypeVar

from onelaunch.checkpoints.atomic import atomic_file, read_bytes, read_json, write_json
from onelaunch.checkpoints.foreign_stderr import without_stderr
from onelaunch.checkpoints.tokenizer_growth import refuse_growth
from onelaunch.errors import BadInput, MissingExtra

FILE_NAME = "tokenizer.json"

# The largest on the Hub take about 33 MB; larger files are refused unread. The lists and tables
# that a file consists of cost memory in Python: real ones have one per merge, half a million.
MAX_FILE_BYTES = 64 << 20
_MAX_BRACKETS = 4 << 20
_SETTINGS_BYTES = 4 << 20
# Settings beside the file may name tokens that it lacks; no special token is long.
_LONGEST_TOKEN = 1024

# A character is at most four bytes, a token at least one: more ids than this without a whole
# character are not text, and waiting longer would make each further id dearer.
_LONGEST_WAIT = 16

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

_T = TypeVar("_T")


class JsonTokenizer:
    """A tokenizer.json and the special tokens that the settings beside it name.

    Special tokens that only tokenizer_config.json names (its added_tokens_decoder, bos_token,
    eos_token and the like) count as if the file had them. `bos_id` begins a text, by the
    tokenizer's own template, or else by tokenizer_config.json, or config.json. `stop_ids` end one:
    the eos ids of generation_config.json or config.json, the eos_token of tokenizer_config.json,
    and `bos_id`. `eos_id` is that eos_token, or else the first of the eos ids. A file that stands
    alone may have none. The settings of NAME.tokenizer.json are NAME.tokenizer_config.json,
    NAME.generation_config.json and NAME.config.json.
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
            # No model of the Llama family has one; where it does not fit the merges, Rust panics.
            raise BadInput(f"{path}: a model with a continuing_subword_prefix is not read here")
        refuse_growth(data, path)
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

    def _build(self, data: dict[str, Any], tables: dict[str, dict[str, Any]]) -> None:
        self._tokenizer = _library().Tokenizer.from_buffer(self._bytes)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = tables["tokenizer_config.json"]
        self._more_tokens = self._add_named(settings)
        """What tokenizer_config.json adds to the file: (id, content) of each."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._silent = {i for i, token in added if token.special} | dict(self._more_tokens).keys()
        ids = [*(i for i, _ in added), *dict(self._more_tokens)]
        self.vocab_size = max(_largest_id(data["model"]), *ids, -1) + 1
        """One more than the largest id: some vocabularies have holes."""
        sample = self._tokenizer.encode("a")
        template = sample.ids[:1] if sample.special_tokens_mask[:1] == [1] else []
        self._adds_bos = bool(template)
        self.bos_id, self.eos_id, self.stop_ids = self._special_ids(tables, template)

    def _add_named(self, settings: dict[str, Any]) -> list[tuple[int, str]]:
        """Add the tokens that tokenizer_config.json names and the file lacks, as transformers does;
        returns id and content of those that are special.

        The library numbers new tokens itself. One that would get another number than the settings
        say is not added: it is known by its number only, and no text makes it.
        """
        tokens = self._tokenizer
        added = tokens.get_added_tokens_decoder()
        special = {token.content: token.special for token in added.values()}
        next_id = max(tokens.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added), 0)
        found: dict[str, int] = {}
        ready: list[tuple[bool, str, dict[str, bool]]] = []
        for number, content, is_special, flags in _named_tokens(settings):
            known = tokens.token_to_id(content)
            number = known if number is None else number
            if number is None or special.get(content) in (True, is_special):
                continue
            if known not in (None, number) or tokens.id_to_token(number) not in (None, content):
                continue  # another one has the content, or the number
            special[content] = is_special
            if known is not None or number == next_id:
                ready.append((is_special, content, flags))
                next_id = max(next_id, number + 1)
            if is_special:
                found[content] = number
        for is_special, entries in groupby(ready, key=lambda entry: entry[0]):
            new = [_library().AddedToken(text, normalized=False, **f) for _, text, f in entries]
            (tokens.add_special_tokens if is_special else tokens.add_tokens)(new)
        return [(number, content) for content, number in found.items()]

    def _special_ids(
        self, tables: dict[str, dict[str, Any]], template: list[int]
    ) -> tuple[int | None, int | None, tuple[int, ...]]:
        more = {content: i for i, content in self._more_tokens}

        def named(key: str) -> list[int]:
            token = _content(tables["tokenizer_config.json"].get(key))
            found = None if token is None else self._tokenizer.token_to_id(token)
            found = more.get(token or "") if found is None else found
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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's content: white space and the order of keys do not count, nor do
        truncation and padding, which are not used. Tokens of tokenizer_config.json do."""
        data = json.loads(self._bytes)
        for name in ("version", "truncation", "padding"):
            data.pop(name, None)
        merges = data["model"].get("merges")
        if isinstance(merges, list):  # "a b" in older files
            data["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
        if self._more_tokens:
            data["more_tokens"] = sorted(self._more_tokens)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def file_fingerprint(self) -> str:
        """SHA-256 of the file's bytes, by which older manifests know a tokenizer."""
        return hashlib.sha256(self._bytes).hexdigest()

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
        return _guarded(lambda: self._decode(spoken), "the ids")

    def _decode(self, spoken: list[int]) -> str:
        return str(self._tokenizer.decode(spoken))

    def decoder(self) -> _JsonStream:
        """Decodes id by id."""
        return _JsonStream(self._decode, self._speaks)

    def piece(self, token: int) -> str:
        """An id's name in the vocabulary; "" where it has none."""
        return str(self._tokenizer.id_to_token(token) or dict(self._more_tokens).get(token, ""))

    def _speaks(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self._silent

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.json` into a folder, atomically; returns its path.

        The tokenizer_config.json found beside it comes along, and a generation_config.json with
        the special ids, unless the folder has one: read from there, the ids are the same.
        All their names begin with `prefix`.
        """
        path = Path(folder) / (prefix + FILE_NAME)
        if self._settings is not None:
            with atomic_file(path.with_name(prefix + "tokenizer_config.json")) as file:
                file.write(self._settings)
        generation = path.with_name(prefix + "generation_config.json")
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
        text = _guarded(self._new_text, "the ids")
        incomplete = text.endswith("\ufffd") and len(self._window) - self._given < _LONGEST_WAIT
        if not text or incomplete:
            return ""
        del self._window[: self._given]
        self._given = len(self._window)
        return text

    def finish(self) -> str:
        """The rest, once no id follows."""
        return _guarded(self._new_text, "the ids")

    def _new_text(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._given])) :]


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
        raise BadInput(f"{path}: damaged or cut off: not valid JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise BadInput(f"{path}: not a tokenizer.json: it has no model")
    return data


def _largest_id(model: dict[str, Any]) -> int:
    """Of a model that the library has read: a table of ids, or a list in the ids' order."""
    vocab = model.get("vocab")
    return max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab or ()) - 1


def _content(token: Any) -> str | None:
    """A token's text, which settings give plainly or in a table."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and 0 < len(text) <= _LONGEST_TOKEN else None


def _named_tokens(
    settings: dict[str, Any],
) -> Iterator[tuple[int | None, str, bool, dict[str, bool]]]:
    """Number, content, whether it is special, and flags of each token that a tokenizer_config.json
    names, by number where it gives one."""
    table = settings.get("added_tokens_decoder")
    entries = table.items() if isinstance(table, dict) else ()
    for key, token in sorted(entries, key=lambda entry: (len(entry[0]), entry[0])):
        content = _content(token)
        if content is not None and re.fullmatch(r"[0-9]{1,9}", key):
            token = token if isinstance(token, dict) else {}
            flags = {flag: bool(token.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
            yield int(key), content, bool(token.get("special")), flags
    for name in _NAMED:
        content = _content(settings.get(name))
        if content is not None:
            yield None, content, True, {}


def _guarded(call: Callable[[], _T], subject: Path | str) -> _T:
    """Run library calls; their errors, a Rust panic among them, become BadInput, and what they
    print goes nowhere."""
    try:
        return without_stderr(call)
    except BaseException as error:
        # pyo3's PanicException is no Exception; an interrupt or a signal passes through
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise BadInput(
            f"{subject}: not a usable tokenizer.json or input for one ({error})"
        ) from error


def _library(path: Path | str = FILE_NAME) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("tokenizers", "hf", f"reading {path}") from None
    return tokenizers
