"""A model to be served: random weights, and a vocabulary of made-up words."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from onelaunch.checkpoints import random_model
from onelaunch.checkpoints.export import export
from onelaunch.checkpoints.tokenizer_llama2c import SPECIALS, Llama2cTokenizer
from onelaunch.checkpoints.tokenizers import Tokenizer

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


def write_model(preset: str, path: Path) -> None:
    """Write a preset's shape as GGUF, matrices in bfloat16. Every token but BOS, EOS and bytes is a
    word, so that each is text as soon as it is there."""
    model = random_model(preset)
    model.weights = {
        name: tensor.bfloat16() if tensor.dim() > 1 else tensor
        for name, tensor in model.weights.items()
    }
    with tempfile.TemporaryDirectory() as folder:  # where the export finds the tokenizer
        model.source = Path(folder)
        tokenizer_of(model.config.vocab_size).save(folder)
        export(model, path, "gguf")


def tokenizer_of(size: int) -> Tokenizer:
    """A tokenizer of `size` pieces."""
    words = (
        b" " * space + bytes(letters)
        for n in range(1, 5)
        for space in (0, 1)
        for letters in itertools.product(LETTERS, repeat=n)
    )
    pieces = [*SPECIALS, b" ", *itertools.islice(words, size - len(SPECIALS) - 1)]
    return Llama2cTokenizer(pieces, [-float(i) for i in range(size)])
