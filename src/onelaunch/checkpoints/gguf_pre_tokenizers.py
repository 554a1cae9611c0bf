"""How llama.cpp splits text before BPE: the names of `tokenizer.ggml.pre`, as steps of a
tokenizer.json.

Each name stands for regular expressions in llama.cpp's source (llama-vocab.cpp). The steps are
those of the models' own tokenizer.json files; they split alike. Qwen's also composes characters
(NFC), which llama.cpp leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`splits`: regular expressions, or "digits", each applied to what the one before left;
    `gpt2_regex`: whether GPT-2's expression, which the library has built in, comes last.
    `ignore_merges`: whether a word that is a piece is taken as it is, and `adds_bos` whether text
    begins with BOS, where the file does not say.
    """

    splits: tuple[str, ...] = ()
    gpt2_regex: bool = False
    normalizer: str | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


_DIGITS = "digits"
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(gpt2_regex=True),
    "smollm": PreTokenizer((_DIGITS,), gpt2_regex=True),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_QWEN2,), normalizer="NFC"),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}


def steps(pre: PreTokenizer) -> dict[str, Any]:
    """Return the "pre_tokenizer" of a tokenizer.json."""
    split: list[dict[str, Any]] = []
    for pattern in pre.splits:
        if pattern == _DIGITS:
            split.append({"type": "Digits", "individual_digits": True})
        else:
            regex = {"Regex": pattern}
            split.append(
                {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
            )
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*split, {**last, "use_regex": pre.gpt2_regex}]}


def recognize(definition: dict[str, Any]) -> str | None:
    """Return the name of the steps in a tokenizer.json; None if they are none of these."""
    pattern = _splits(definition.get("pre_tokenizer"))
    normalizer = definition.get("normalizer")
    normalizer = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    ignore_merges = bool(definition["model"].get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        same = (pre.splits, pre.gpt2_regex) == pattern and pre.ignore_merges == ignore_merges
        if same and normalizer in (None, pre.normalizer):
            return name
    return None


def _splits(pre_tokenizer: Any) -> tuple[tuple[str, ...], bool] | None:
    """Return the splits before a last step of bytes, and whether that splits as GPT-2 does."""
    if not isinstance(pre_tokenizer, dict):
        return None
    sequence = pre_tokenizer.get("type") == "Sequence"
    *splits, last = pre_tokenizer.get("pretokenizers") or [{}] if sequence else [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    patterns = []
    for step in splits:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(_DIGITS)
        elif step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            patterns.append(str(pattern.get("Regex") if isinstance(pattern, dict) else None))
        else:
            return None
    return tuple(patterns), last.get("use_regex", True)
