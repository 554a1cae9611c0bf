"""Read the tokenizer in a GGUF file.

`tokenizer.ggml.model` "llama" is sentencepiece's BPE, a score per piece: it becomes a llama2.c
tokenizer. "gpt2" is BPE over bytes, with merges and a name for how text is split before: it becomes
a tokenizer.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.gguf_header import Header
from onelaunch.checkpoints.gguf_pre_tokenizers import ALIASES, PRE_TOKENIZERS, steps
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
SPACE = "\u2581"
"""What stands for a space in pieces of "llama" tokenizers."""
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
    if model == "llama":
        return _read_llama(header, tokens, types)
    bos_id, stop_ids = special_ids(header, rows)
    return _read_gpt2(header, tokens, types, bos_id, stop_ids)


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


def _read_llama(
    header: Header, tokens: list[bytes], types: list[int]
) -> BytesTokenizer | Llama2cTokenizer:
    """Convert sentencepiece's BPE with ids as in llama2.c's vocabularies."""
    special = [header.integer(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
    if special[0] not in (None, 1) or special[1] not in (None, 2):
        raise header.error(
            f"a sentencepiece tokenizer with BOS {special[0]} and EOS {special[1]} is not "
            "supported, only with 1 and 2"
        )
    if header.flag("tokenizer.ggml.add_bos_token") is False:
        raise header.error("a sentencepiece tokenizer that adds no BOS is not supported")
    for i in range(FIRST_PIECE, len(tokens)):
        if types[i] not in (NORMAL, UNUSED):
            raise header.error(
                f"its tokenizer's piece {i}, {_shown(tokens[i])}, is a special token; a "
                "sentencepiece tokenizer with more than <unk>, <s> and </s> is not supported: put "
                f"the model's tokenizer.json next to it as {header.path.stem}.tokenizer.json"
            )
    space = SPACE.encode()
    if header.flag("tokenizer.ggml.add_space_prefix") is False:
        at = FIRST_BYTE + ord(" ")
        names = [*tokens[FIRST_BYTE:at], SPECIALS[at], *tokens[at + 1 :]]
        if names == SPECIALS[FIRST_BYTE:] and tokens[at] in (space, SPECIALS[at]):
            return BytesTokenizer()
        raise header.error("a sentencepiece tokenizer that adds no space is not supported")
    scores = header.numbers("tokenizer.ggml.scores") or []
    pieces = [token.replace(space, b" ") for token in tokens]
    pieces[:FIRST_BYTE] = SPECIALS[:FIRST_BYTE]
    try:
        return Llama2cTokenizer(pieces, [float(score) for score in scores[: len(pieces)]])
    except BadInput as error:
        raise header.error(f"its tokenizer is not one as llama2.c's: {error}") from None


def _read_gpt2(
    header: Header,
    tokens: list[bytes],
    types: list[int],
    bos_id: int | None,
    stop_ids: tuple[int, ...],
) -> JsonTokenizer:
    """Build the tokenizer.json of BPE over bytes."""
    name = header.text("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(ALIASES.get(name, name))
    if pre is None:
        raise header.error(
            f"the pre-tokenizer {name!r} is not supported, only {', '.join(PRE_TOKENIZERS)}; put "
            f"the model's tokenizer.json next to it as {header.path.stem}.tokenizer.json"
        )
    try:
        pieces = [str(token, "utf-8") for token in tokens]
        merges = [str(merge, "utf-8") for merge in header.strings("tokenizer.ggml.merges") or ()]
    except UnicodeDecodeError as error:
        raise header.error("damaged: a piece of its tokenizer is not UTF-8") from error
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise header.error("a piece of its tokenizer occurs twice")
    adds_bos = header.flag("tokenizer.ggml.add_bos_token")
    adds_bos = pre.adds_bos if adds_bos is None else adds_bos
    bos = pieces[bos_id] if adds_bos and bos_id is not None and bos_id < len(pieces) else None
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": pieces[i], **flags, "special": kind == CONTROL}
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED) and pieces[i]
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
        "pre_tokenizer": steps(pre),
        "post_processor": None if bos is None else _template(bos, vocab[bos]),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
    eos_id = header.integer("tokenizer.ggml.eos_token_id")
    ends = sorted(stop_ids, key=lambda stop: stop != eos_id)
    settings: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": ends}
    return JsonTokenizer.from_definition(definition, settings, header.path)


def _template(bos: str, bos_id: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _shown(token: bytes) -> str:
    return repr(token[:40].decode("utf-8", "replace"))
