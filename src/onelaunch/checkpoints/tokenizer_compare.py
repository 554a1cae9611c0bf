"""Compare two tokenizers by their ids, for any kind and layout of their files."""

from __future__ import annotations

from collections.abc import Iterator

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.errors import BadInput

# Pieces of a vocabulary that are tried, evenly spread, and how many are joined to a text.
_PIECES = 4096
_PIECES_PER_TEXT = 32
# A tokenizer.json encodes these as control tokens, a tokenizer.bin as plain characters.
_CONTROL = ("<unk>", "<s>", "</s>")

_TEXTS = (
    "",
    "Once upon a time, there was a little girl named Lily. She had 12 cats and 3,456.78 dogs.",
    "  two  spaces,\ta tab\n\nlines \r\n  and a tail  ",
    "def f(x): return {'a': [x ** 2, x != 1], \"b\": x<<3}  # \\n",
    "caf\u00e9 e\u0301 \u00c5 \u2126 \uff21\u00bd\ufb01 \u00a0\u200b \u2581 \ufffd \x00\x7f",
    "\u4f60\u597d \u3053\u3093 \u043f\u0440\u0438\u0432\u0435\u0442 \u05e9 \u0645",
    "\U0001f600\U0001f680",
    *(bytes(range(first, first + 32)).decode("latin-1") for first in range(0, 256, 32)),
)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids.

    They do if they have the same kind and fingerprint. Otherwise (a tokenizer.bin and the
    tokenizer.json exported from it share no bytes) both encode texts in many scripts and texts
    joined from the pieces of both vocabularies. Pieces that no text produces do not count.
    """
    if a.kind == b.kind and a.fingerprint == b.fingerprint:
        return True
    try:
        return all(
            a.encode(text, bos=False) == b.encode(text, bos=False)
            for texts in (_TEXTS, _vocabulary_texts(a), _vocabulary_texts(b))
            for text in texts
        )
    except BadInput:
        return False


def _vocabulary_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts joined from the pieces of a vocabulary, with and without spaces between them."""
    step = -(-tokenizer.vocab_size // _PIECES)
    texts = [tokenizer.decode([i]) for i in range(0, tokenizer.vocab_size, step)]
    pieces = [text for text in texts if text and "\ufffd" not in text and text not in _CONTROL]
    for first in range(0, len(pieces), _PIECES_PER_TEXT):
        chunk = pieces[first : first + _PIECES_PER_TEXT]
        yield "".join(chunk)
        yield " ".join(chunk)
