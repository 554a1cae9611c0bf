"""Read the tokenizer in a GGUF file.

`tokenizer.ggml.model` "llama" is sentencepiece's BPE, a score per piece: it becomes a llama2.c
tokenizer, or a tokenizer.json where it has more special tokens or ids elsewhere. "gpt2" is BPE over
bytes, with merges and a name for how text is split before: it becomes
a tokenizer.json.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.gguf_header import Header
from onelaunch.checkpoints.gguf_pre_tokenizers import ALIASES, PRE_TOKENIZERS, steps
from onelaunch.checkpoints.gguf_sentencepiece import SPACE, definition
from onelaunch.checkpoints.tokenizer_bytes import BytesTokenizer
from onelaunch.checkpoints.tokenizer_json import JsonTokenizer
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_BYTE,
    FIRST_PIECE,
    MAX_PIECES,
    SPECIALS,
    Llama2cTokenizer,
)
from onelaunch.errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""
NO_MODEL = ("no_vocab", "none")
_PAD = re.compile(rb"\[PAD\d*\]")
# Control tokens at which llama.cpp stops whatever the file says.
_ENDS = (b"<|eot_id|>", b"<|im_end|>", b"<|end|>", b"<|eom_id|>", b"<|endoftext|>")


def read_tokenizer(path: Path) -> BytesTokenizer | Llama2cTokenizer | JsonTokenizer | None:
    """Read the tokenizer in a file; None if it has none. Raises BadInput naming the file if it
    cannot be used, MissingExtra without the package tokenizers."""
    header = Header(path)
    model = header.text("tokenizer.ggml.model")
    if model is None or model in NO_MODEL:
        return None
    if model not in ("llama", "gpt2"):
        raise header.error(f"a tokenizer of the kind {model!r} is not supported")
    tokens = header.strings("tokenizer.ggml.tokens") or []
    types = header.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise header.error("the pieces of its tokenizer are missing, or have not one type each")
    if len(tokens) > MAX_PIECES:
        raise header.error(f"{len(tokens)} pieces are more than the {MAX_PIECES} supported")
    rows = len(tokens)
    while tokens and types[-1] == UNUSED and _PAD.fullmatch(tokens[-1]):
        del tokens[-1], types[-1]
    if model == "llama" and (tokenizer := _read_llama2c(header, tokens, types)) is not None:
        return tokenizer
    vocabulary = _Vocabulary(header, tokens, types, rows)
    return vocabulary.sentencepiece() if model == "llama" else vocabulary.byte_level()


def special_ids(header: Header, rows: int) -> tuple[int | None, tuple[int, ...]]:
    """Return BOS and the stop ids (BOS, EOS, end of turn, end of message; and control tokens that
    always end a text), without those outside `rows`."""
    defaults = {"bos": 1, "eos": 2} if header.text("tokenizer.ggml.model") == "llama" else {}

    def by_key(name: str) -> int | None:
        value = header.integer(f"tokenizer.ggml.{name}_token_id")
        value = defaults.get(name) if value is None else value
        return value if value is not None and 0 <= value < rows else None

    bos_id = by_key("bos")
    stops = {bos_id, *map(by_key, ("eos", "eot", "eom"))} - {None}
    tokens = header.strings("tokenizer.ggml.tokens") or []
    types = header.numbers("tokenizer.ggml.token_type") or []
    for i, (token, kind) in enumerate(zip(tokens[:rows], types, strict=False)):
        if kind == CONTROL and token in _ENDS:
            stops.add(i)
    return bos_id, tuple(sorted(stops))  # type: ignore[arg-type, type-var]


def _read_llama2c(
    header: Header, tokens: list[bytes], types: list[int]
) -> BytesTokenizer | Llama2cTokenizer | None:
    """Convert sentencepiece's BPE with the ids and special tokens of llama2.c's vocabularies; None
    for others."""
    ids = [header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
    first_ids = ids[0] in (None, 1) and ids[1] in (None, 2)
    learned = all(kind in (NORMAL, UNUSED) for kind in types[FIRST_PIECE:])
    if not first_ids or not learned or header.flag("tokenizer.ggml.add_bos_token") is False:
        return None
    space = SPACE.encode()
    if header.flag("tokenizer.ggml.add_space_prefix") is False:
        at = FIRST_BYTE + ord(" ")
        names = [*tokens[FIRST_BYTE:at], SPECIALS[at], *tokens[at + 1 :]]
        is_bytes = names == SPECIALS[FIRST_BYTE:] and tokens[at] in (space, SPECIALS[at])
        return BytesTokenizer() if is_bytes else None
    if tokens[FIRST_BYTE:FIRST_PIECE] != SPECIALS[FIRST_BYTE:]:
        return None
    pieces = [token.replace(space, b" ") for token in tokens]
    pieces[:FIRST_BYTE] = SPECIALS[:FIRST_BYTE]
    try:
        return Llama2cTokenizer(pieces, _scores(header, len(pieces)))
    except BadInput as error:
        raise header.error(f"its tokenizer cannot be used: {error}") from None


def _scores(header: Header, n: int) -> list[float]:
    scores = header.numbers("tokenizer.ggml.scores") or []
    return [float(score) for score in scores[:n]]


class _Vocabulary:
    """Pieces and their types, to make a tokenizer.json of."""

    def __init__(self, header: Header, tokens: list[bytes], types: list[int], rows: int) -> None:
        self._header, self._types = header, types
        try:
            self._pieces = [str(token, "utf-8") for token in tokens]
        except UnicodeDecodeError as error:
            raise header.error("damaged: a piece of its tokenizer is not UTF-8") from error
        if len(set(self._pieces)) != len(self._pieces):
            raise header.error("a piece of its tokenizer occurs twice")
        self._bos_id, self._stop_ids = special_ids(header, rows)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        self._added = [
            {"id": i, "content": self._pieces[i], **flags, "special": kind != USER_DEFINED}
            for i, kind in enumerate(types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and self._pieces[i]
        ]

    def sentencepiece(self) -> JsonTokenizer:
        """Build the tokenizer.json of BPE with scores."""
        header, pieces, types = self._header, self._pieces, self._types
        unknown = header.integer("tokenizer.ggml.unknown_token_id") or 0
        scores = _scores(header, len(pieces))
        missing = {name.decode() for name in SPECIALS[FIRST_BYTE:]} - set(pieces)
        if len(scores) != len(pieces) or not all(map(math.isfinite, scores)) or missing:
            raise header.error("its tokenizer has not all bytes, or not one finite score per piece")
        if unknown >= len(pieces):
            raise header.error(f"tokenizer.ggml.unknown_token_id {unknown} is no piece")
        prefix = header.flag("tokenizer.ggml.add_space_prefix") is not False
        mergeable = [kind == NORMAL for kind in types]
        data = definition(pieces, scores, mergeable, pieces[unknown], self._added, prefix)
        return self._tokenizer(data, True)

    def byte_level(self) -> JsonTokenizer:
        """Build the tokenizer.json of BPE over bytes."""
        header = self._header
        name = header.text("tokenizer.ggml.pre") or "default"
        pre = PRE_TOKENIZERS.get(ALIASES.get(name, name))
        if pre is None:
            raise header.error(
                f"the pre-tokenizer {name!r} is not supported, only {', '.join(PRE_TOKENIZERS)}; "
                f"put the model's tokenizer.json next to it as {header.path.stem}.tokenizer.json"
            )
        stored = header.strings("tokenizer.ggml.merges") or []
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {piece: i for i, piece in enumerate(self._pieces)},
            "merges": [str(merge, "utf-8", "replace") for merge in stored],
        }
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        data = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added,
            "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
            "pre_tokenizer": steps(pre),
            "decoder": {**decoder, "use_regex": False},
            "model": model,
        }
        return self._tokenizer(data, pre.adds_bos)

    def _tokenizer(self, data: dict[str, Any], adds_bos: bool) -> JsonTokenizer:
        """Add the special ids, and BOS in front of text (`adds_bos`: where the file does not say
        whether)."""
        stored = self._header.flag("tokenizer.ggml.add_bos_token")
        begins, bos_id = adds_bos if stored is None else stored, self._bos_id
        template = None
        if begins and bos_id is not None and bos_id < len(self._pieces):
            template = _template(self._pieces[bos_id], bos_id)
        eos_id = self._header.integer("tokenizer.ggml.eos_token_id")
        ends = sorted(self._stop_ids, key=lambda stop: stop != eos_id)
        ids: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": ends}
        data = {**data, "post_processor": template}
        return JsonTokenizer.from_definition(data, ids, self._header.path)


def _template(bos: str, bos_id: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
