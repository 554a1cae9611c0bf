"""Sentencepiece's BPE in GGUF files and as a tokenizer.json: scores on one side, merges on the
other.

A tokenizer.json made from a sentencepiece model has its merges in the order of the scores of what
they form, so that each can be computed from the other.
"""

from __future__ import annotations

from typing import Any

SPACE = "\u2581"
"""What stands for a space in pieces."""


def definition(
    pieces: list[str],
    scores: list[float],
    mergeable: list[bool],
    unknown: str,
    added: list[dict[str, Any]],
    prefix: bool,
) -> dict[str, Any]:
    """Return the content of a tokenizer.json, without its post-processor.

    `mergeable`: whether text can become a piece. `added`: the entries of added_tokens. `prefix`:
    whether text begins with a space that is added.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, scores, mergeable),
        },
    }


def _merges(pieces: list[str], scores: list[float], mergeable: list[bool]) -> list[list[str]]:
    """Return every two pieces that form a piece, the best score first."""
    formed = {piece for piece, merges in zip(pieces, mergeable, strict=True) if merges}
    found: list[tuple[float, int, str, str]] = []
    for i, piece in enumerate(pieces):
        if not mergeable[i]:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in formed and right in formed:
                found.append((-scores[i], i, left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def scores_of(data: dict[str, Any], n: int) -> list[float] | None:
    """Return a score for each of n ids, from the merges of a tokenizer.json; None if it is not one
    of sentencepiece's BPE."""
    model = data["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or adds_prefix(data) is None:
        return None
    scores = [-float(len(model["merges"]) + 1)] * n
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        i = model["vocab"].get(left + right)
        if i is not None and i < n and scores[i] < -rank:
            scores[i] = -float(rank)
    return scores


def adds_prefix(data: dict[str, Any]) -> bool | None:
    """Return whether a tokenizer.json adds a space before text; None if it treats spaces in another
    way than sentencepiece."""
    normalizer, pre_tokenizer = data.get("normalizer"), data.get("pre_tokenizer")
    if pre_tokenizer is None and isinstance(normalizer, dict):
        steps = normalizer.get("normalizers") or [normalizer]
        kinds = [(step.get("type"), step.get("prepend") or step.get("content")) for step in steps]
        if kinds == [("Prepend", SPACE), ("Replace", SPACE)]:
            return True
        return False if kinds == [("Replace", SPACE)] else None
    if normalizer is not None or not isinstance(pre_tokenizer, dict):
        return None
    if pre_tokenizer.get("type") != "Metaspace" or pre_tokenizer.get("split", True):
        return None
    # its other schemes add no space to text that begins with one
    return False if pre_tokenizer.get("prepend_scheme") == "never" else None
