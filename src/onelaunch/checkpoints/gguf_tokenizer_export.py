"""Write a tokenizer into a GGUF file; `gguf_tokenizer` reads it back."""

from __future__ import annotations

from typing import Any

from onelaunch.checkpoints.gguf_pre_tokenizers import recognize
from onelaunch.checkpoints.gguf_sentencepiece import SPACE, adds_prefix, definition, scores_of
from onelaunch.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NO_MODEL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from onelaunch.checkpoints.tokenizer_bytes import BytesTokenizer
from onelaunch.checkpoints.tokenizer_compare import same_tokenizer
from onelaunch.checkpoints.tokenizer_json import JsonTokenizer
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_BYTE,
    FIRST_PIECE,
    SPECIALS,
    Llama2cTokenizer,
)
from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.errors import BadInput

_CONTROL = [b"<unk>", b"<s>", b"</s>"]
_KINDS = {"normal": NORMAL, "special": CONTROL, "added": USER_DEFINED, "none": UNUSED}


def tokenizer_keys(tokenizer: Tokenizer | None, rows: int) -> dict[str, Any]:
    """Return what a GGUFWriter adds for a tokenizer, by the names of its methods without `add_`;
    `rows` is the vocabulary of the model.

    Raises BadInput for a tokenizer with more pieces, or of a kind that llama.cpp does not have.
    """
    if tokenizer is None:
        return {"tokenizer_model": NO_MODEL[0]}
    if tokenizer.vocab_size > rows:
        raise BadInput(
            f"format='gguf': the tokenizer has {tokenizer.vocab_size} tokens, more than the "
            f"{rows} of the model"
        )
    if isinstance(tokenizer, JsonTokenizer):
        data = tokenizer.definition()
        scores = scores_of(data, tokenizer.vocab_size)
        made = _gpt2(tokenizer, data) if scores is None else _llama_json(tokenizer, data, scores)
    else:
        made = _llama(tokenizer)
    keys, tokens, types = made
    while len(tokens) < rows:
        tokens.append(b"[PAD%d]" % len(tokens))
        types.append(UNUSED)
    if "token_scores" in keys:
        keys["token_scores"] += [0.0] * (rows - len(keys["token_scores"]))
    return {**keys, "token_list": tokens, "token_types": types}


def _llama(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[bytes], list[int]]:
    space = SPACE.encode()
    tokens = [*_CONTROL, *SPECIALS[FIRST_BYTE:]]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * (FIRST_PIECE - FIRST_BYTE)]
    if isinstance(tokenizer, BytesTokenizer):
        # llama.cpp replaces every space before it looks for pieces
        tokens[FIRST_BYTE + ord(" ")], types[FIRST_BYTE + ord(" ")] = space, NORMAL
    pieces = tokenizer.pieces if isinstance(tokenizer, Llama2cTokenizer) else []
    seen = set(tokens)
    for i, piece in enumerate(pieces[FIRST_PIECE:], FIRST_PIECE):
        token, kind = piece.replace(b" ", space), NORMAL
        if not piece or space in piece or token in seen or not _is_utf8(piece):
            # no text becomes such a piece; llama.cpp refuses some of them
            token, kind = b"<piece %d>" % i, UNUSED
        seen.add(token)
        tokens.append(token)
        types.append(kind)
    keys = {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "add_bos_token": True,
        "add_space_prefix": isinstance(tokenizer, Llama2cTokenizer),
        "token_scores": list(map(float, getattr(tokenizer, "scores", ()))),
    }
    return keys, tokens, types


def _llama_json(
    tokenizer: JsonTokenizer, data: dict[str, Any], scores: list[float]
) -> tuple[dict[str, Any], list[bytes], list[int]]:
    """Convert a tokenizer.json made from a sentencepiece model: scores from the order of merges, if
    those give the same ids."""
    entries = tokenizer.entries()
    unknown = data["model"].get("unk_token")
    bytes_ = {name.decode() for name in SPECIALS[FIRST_BYTE:]}
    types = []
    for text, kind in entries:
        number = _KINDS[kind]
        if kind == "normal" and text in bytes_:
            number = BYTE
        types.append(UNKNOWN if text == unknown else number)
    pieces = [text or f"[PAD{i}]" for i, (text, _) in enumerate(entries)]
    prefix = bool(adds_prefix(data))
    again = None
    if unknown in pieces and bytes_ <= set(pieces) and len(set(pieces)) == len(pieces):
        normal = [number == NORMAL for number in types]
        added = data.get("added_tokens") or []
        written = definition(pieces, scores, normal, unknown, added, prefix)
        again = JsonTokenizer.from_definition(written, {}, "the tokenizer to write")
    if again is None or not same_tokenizer(tokenizer, again):
        raise BadInput(
            "format='gguf': the file cannot store the tokenizer: its merges are not in the order "
            "of scores, or it has not all bytes"
        )
    keys = {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "add_bos_token": tokenizer.adds_bos,
        "add_space_prefix": prefix,
        "unk_token_id": pieces.index(unknown),
        "token_scores": scores,
    }
    return keys, [piece.encode("utf-8") for piece in pieces], types


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _gpt2(
    tokenizer: JsonTokenizer, data: dict[str, Any]
) -> tuple[dict[str, Any], list[bytes], list[int]]:
    model, decoder = data["model"], data.get("decoder") or {}
    pre = recognize(data)
    reason = ""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        reason = "no BPE over bytes"
    elif any(model.get(name) for name in ("dropout", "end_of_word_suffix")):
        reason = "BPE with dropout or suffixes"
    elif decoder.get("type") != "ByteLevel" or pre is None:
        reason = "a way of splitting text that has no name in llama.cpp, or none that is known here"
    elif not model.get("merges"):
        reason = "no merges"
    if reason:
        raise BadInput(f"format='gguf': the file cannot store the tokenizer: it has {reason}")
    entries = tokenizer.entries()
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    keys = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_merges": merges,
        "add_bos_token": tokenizer.adds_bos,
    }
    tokens = [(text or f"[PAD{i}]").encode("utf-8") for i, (text, _) in enumerate(entries)]
    return keys, tokens, [_KINDS[kind] for _, kind in entries]
