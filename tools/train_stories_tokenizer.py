"""Train the tokenizer of the built-in stories and write it where the package ships it.

Run it after a change of the grammar, then raise GRAMMAR_VERSION in training/stories.py and copy the
SHA-256 that it prints into training/story_data.py:

    python tools/train_stories_tokenizer.py
"""

from __future__ import annotations

from pathlib import Path

from onelaunch.checkpoints.tokenizers import Llama2cTokenizer, train_llama2c
from onelaunch.training.stories import story

TARGET = Path(__file__).parents[1] / "src/onelaunch/training/stories_tokenizer.bin"
VOCAB_SIZE = 512
N_STORIES = 20_000


def train(n_stories: int = N_STORIES) -> Llama2cTokenizer:
    """A tokenizer for the first stories of a series of their own."""
    return train_llama2c((story(-1, index) for index in range(n_stories)), VOCAB_SIZE)


def main() -> None:
    """Write the tokenizer; print its digest and how long stories become."""
    tokenizer = train()
    TARGET.write_bytes(tokenizer.to_bytes())
    lengths = sorted(len(tokenizer.encode(story(-1, index))) for index in range(N_STORIES))
    print(f"{TARGET.name}: {VOCAB_SIZE} pieces, sha256 {tokenizer.fingerprint}")
    print(f"tokens per story, with BOS: {lengths[0]} to {lengths[-1]}")


if __name__ == "__main__":
    main()
