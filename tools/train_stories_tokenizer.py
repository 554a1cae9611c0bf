"""Train the tokenizer of the built-in stories and write it where the package ships it.

Run it after a change of the grammar (and raise GRAMMAR_VERSION):

    python tools/train_stories_tokenizer.py
"""

from __future__ import annotations

from pathlib import Path

from onelaunch.checkpoints.tokenizers import train_llama2c
from onelaunch.training.stories import story

TARGET = Path(__file__).parents[1] / "src/onelaunch/training/stories_tokenizer.bin"
VOCAB_SIZE = 512
N_STORIES = 20_000


def main() -> None:
    """Train on the first stories of a series that no sampler uses, and report the lengths."""
    texts = [story(-1, index) for index in range(N_STORIES)]
    tokenizer = train_llama2c(texts, VOCAB_SIZE)
    TARGET.write_bytes(tokenizer.to_bytes())
    lengths = sorted(len(tokenizer.encode(text)) for text in texts)
    print(f"{TARGET.name}: {VOCAB_SIZE} pieces, sha256 {tokenizer.fingerprint}")
    print(f"tokens per story, with BOS: {lengths[0]} to {lengths[-1]}")


if __name__ == "__main__":
    main()
