"""Export llama2.c and byte tokenizers to a tokenizer.json for transformers.

The ids are the same: BPE over the whole text with byte fallback, each piece merged from every two
pieces that form it, the best score first. If two pieces have the same score, or a piece has two
overlapping merges, Hugging Face's BPE may not choose the leftmost; in trained tokenizers all scores
differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import write_json
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_PIECE,
    Llama2cTokenizer,
)
from onelaunch.checkpoints.tokenizers import BytesTokenizer

_CONTROL = ["<unk>", "<s>", "</s>"]


def save_for_transformers(tokenizer: Llama2cTokenizer | BytesTokenizer, folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json into a folder, atomically.

    transformers.AutoTokenizer can load them; returns the path of tokenizer.json.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    path = folder / "tokenizer.json"
    write_json(path, _tokenizer_json(tokenizer))
    return path


def _tokenizer_json(tokenizer: Llama2cTokenizer | BytesTokenizer) -> dict[str, Any]:
    vocab = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges: list[tuple[str, str]] = []
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    added_space = isinstance(tokenizer, Llama2cTokenizer)
    if isinstance(tokenizer, Llama2cTokenizer):
        vocab, merges = _pieces_and_merges(tokenizer, vocab)
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": content, **flags, "special": True}
            for i, content in enumerate(_CONTROL)
        ],
        "normalizer": {"type": "Prepend", "prepend": " "} if added_space else None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(vocab)},
            "merges": merges,
        },
    }


def _pieces_and_merges(
    tokenizer: Llama2cTokenizer, specials: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of all pieces, and the merges in order of priority."""
    ids = {piece: i for i, piece in enumerate(specials)}
    names = list(specials)
    for i in range(FIRST_PIECE, tokenizer.vocab_size):
        name = tokenizer.pieces[i].decode("utf-8", "replace")
        # Text never produces a piece that is not UTF-8, occurs twice, or looks like a byte.
        if "\ufffd" in name or name in ids or not name:
            name = f"<piece {i}>"
        ids[name] = i
        names.append(name)
    merges: list[tuple[float, int, int, int]] = []
    for i in range(FIRST_PIECE, tokenizer.vocab_size):
        for cut in range(1, len(names[i])):
            left, right = ids.get(names[i][:cut], 0), ids.get(names[i][cut:], 0)
            if left >= FIRST_PIECE and right >= FIRST_PIECE:
                merges.append((-tokenizer.scores[i], i, left, right))
    return names, [(names[left], names[right]) for *_, left, right in sorted(merges)]
