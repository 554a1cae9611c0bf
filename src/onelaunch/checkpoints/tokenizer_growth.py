"""How much longer the steps of a tokenizer.json can make a text, worked out without running them.

A normalizer that replaces "a" by a thousand letters, five times over, turns one letter into 10^15:
such a file is refused before the library applies it, which it does to the file's own added tokens
as soon as it reads them.

Each step turns a text of n bytes into one of at most scale * n + added bytes. Steps that change a
text once and leave it as it is the second time (Unicode normal forms, lower case, stripping) count
as 1, though the longest of Unicode's decompositions takes 11 times the bytes of its character.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onelaunch.errors import BadInput

# Tokenizers of Llama's family reach 6 (NFC and bytes), sentencepiece's with a table 400.
MAX_SCALE = 512
MAX_STEPS = 64
# What the steps may make of all added tokens together; the largest lists take about 100 kB.
MAX_BYTES = 64 << 20

_BYTE_LEVEL = 2  # a byte becomes a character of up to two bytes
_LONGEST_CHARACTER = 4


def refuse_growth(data: dict[str, Any], path: Path) -> None:
    """Raise BadInput, naming the file, where a tokenizer.json makes texts far too long."""
    added_tokens = [token for token in _list(data.get("added_tokens")) if isinstance(token, dict)]
    size = 1 + sum(_length(token.get("content")) for token in added_tokens)
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",), ("post_processor",)):
        name = " and ".join(parts)
        steps = [step for part in parts for step in _steps(data.get(part))]
        if len(steps) > MAX_STEPS:
            raise BadInput(f"{path}: {len(steps)} steps in its {name}; at most {MAX_STEPS} are run")
        scale, total = 1.0, float(size)
        for factor, added in map(_growth, steps):
            scale *= factor
            total = total * factor + added
        if scale > MAX_SCALE:
            raise BadInput(
                f"{path}: its {name} could make a text {scale:.2g} times as long; "
                f"at most {MAX_SCALE} times is accepted"
            )
        if total > MAX_BYTES:
            raise BadInput(
                f"{path}: its {name} could make {total:.2g} bytes of the file's own tokens; "
                f"at most {MAX_BYTES} are accepted"
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A part's steps, those of nested sequences one by one."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        yield step
        for name in ("normalizers", "pretokenizers", "decoders", "processors"):
            waiting += reversed(_list(step.get(name)))


def _growth(step: dict[str, Any]) -> tuple[float, int]:
    """(scale, added) of one step. It is known by its fields: the library reads steps without a
    "type" too, as old files have them."""
    if "pattern" in step and "content" in step:
        return _replacement(step["pattern"], _length(step["content"]))
    if "precompiled_charsmap" in step:
        return _longest_entry(step["precompiled_charsmap"]), 0
    if "prepend" in step:
        return 1, _length(step["prepend"])
    if "replacement" in step:
        return _LONGEST_CHARACTER, _LONGEST_CHARACTER
    if "single" in step:
        return _template(step)
    if step.get("type") == "ByteLevel" or "trim_offsets" in step:
        return _BYTE_LEVEL, 1
    return 1, 0


def _replacement(pattern: Any, length: int) -> tuple[float, int]:
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(text, str) and text:
        return max(1.0, length / len(text.encode("utf-8", "replace"))), 0
    return 1 + length, length  # an expression may match before every character


def _longest_entry(table: Any) -> float:
    """The longest replacement in sentencepiece's table: a trie, its size before it, then strings
    that each end with a zero byte."""
    try:
        raw = base64.b64decode(table, validate=False)
    except (binascii.Error, TypeError, ValueError):
        return 1
    strings = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, *map(len, strings.split(b"\0")))


def _template(step: dict[str, Any]) -> tuple[float, int]:
    """A template's repeated sequences, and its special tokens, of which each has several ids."""
    ids = {}
    specials = step.get("special_tokens")
    for name, token in specials.items() if isinstance(specials, dict) else ():
        ids[name] = len(_list(token.get("ids"))) if isinstance(token, dict) else 0
    sequences = added = 0
    for piece in _list(step.get("single")):
        if isinstance(piece, dict) and "Sequence" in piece:
            sequences += 1
        elif isinstance(piece, dict) and isinstance(token := piece.get("SpecialToken"), dict):
            name = token.get("id")
            added += ids.get(name, 0) if isinstance(name, str) else 0
    return max(1, sequences), added


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _length(text: Any) -> int:
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
