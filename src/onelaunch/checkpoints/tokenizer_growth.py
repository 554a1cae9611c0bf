"""Bound how much longer the steps of a tokenizer.json can make a text, without running them.

A normalizer that replaces "a" by a thousand letters, five times in a row, turns one letter into
10^15. Such a file is refused before the library loads it, as loading already normalizes the file's
added tokens.

Each step turns a text of n bytes into one of at most scale * n + added bytes. Idempotent steps
(Unicode normal forms, lower case, stripping) count as 1, though the longest Unicode decomposition
takes 11 times the bytes of its character.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onelaunch.errors import BadInput

# Tokenizers of the Llama family reach 6 (NFC and bytes), sentencepiece's with a table 400.
MAX_SCALE = 512
MAX_STEPS = 64
# Limit of the bytes made from all added tokens; the largest lists take about 100 kB.
MAX_BYTES = 64 << 20

_BYTE_LEVEL = 2  # a byte becomes a character of up to two bytes
_LONGEST_CHARACTER = 4


def check_growth(data: dict[str, Any], path: Path) -> None:
    """Raise BadInput, naming the file, if a tokenizer.json can make texts far too long."""
    added_tokens = [token for token in _list(data.get("added_tokens")) if isinstance(token, dict)]
    size = 1 + sum(_length(token.get("content")) for token in added_tokens)
    for components in (("normalizer", "pre_tokenizer"), ("decoder",), ("post_processor",)):
        name = " and ".join(components)
        steps = [step for component in components for step in _steps(data.get(component))]
        if len(steps) > MAX_STEPS:
            raise BadInput(
                f"{path}: {len(steps)} steps in its {name}; at most {MAX_STEPS} are allowed"
            )
        scale, total = 1.0, float(size)
        for factor, added in map(_growth, steps):
            scale *= factor
            total = total * factor + added
        if scale > MAX_SCALE:
            raise BadInput(
                f"{path}: its {name} could make a text {scale:.2g} times as long; "
                f"at most {MAX_SCALE} times is allowed"
            )
        if total > MAX_BYTES:
            raise BadInput(
                f"{path}: its {name} could make {total:.2g} bytes of the file's own tokens; "
                f"at most {MAX_BYTES} are allowed"
            )


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a component, nested sequences flattened."""
    stack = [component]
    while stack:
        step = stack.pop()
        if not isinstance(step, dict):
            continue
        yield step
        for name in ("normalizers", "pretokenizers", "decoders", "processors"):
            stack += reversed(_list(step.get(name)))


def _growth(step: dict[str, Any]) -> tuple[float, int]:
    """Return (scale, added) of one step. Its kind is recognized by its fields, as the library also
    reads steps without a "type", from old files."""
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
    return 1 + length, length  # a regular expression may match before every character


def _longest_entry(table: Any) -> float:
    """Return the longest replacement in sentencepiece's table: the size of a trie, the trie, then
    zero-terminated strings."""
    try:
        raw = base64.b64decode(table, validate=False)
    except (binascii.Error, TypeError, ValueError):
        return 1
    strings = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(1, *map(len, strings.split(b"\0")))


def _template(step: dict[str, Any]) -> tuple[float, int]:
    """Return the number of sequences in a template, and of the ids of its special tokens."""
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
