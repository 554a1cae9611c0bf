"""Small tokenizers and models in files, made here: what tests of faults begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onelaunch.checkpoints import save
from onelaunch.checkpoints.tokenizers import Llama2cTokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.model import Model

END = "<|endoftext|>"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1056540\n"


def byte_names() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, as GPT-2 has them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]


def byte_names_by_value() -> dict[int, str]:
    """The same by the byte that each stands for."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    values = [*shown, *(byte for byte in range(256) if byte not in shown)]
    return dict(zip(values, byte_names(), strict=True))


def token(number: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def json_tokenizer(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json of 257 ids: the bytes and an end token. `changes` replace its parts."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    data: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(256, END)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate(byte_names())},
            "merges": [],
        },
    }
    return data | changes


def write_json_tokenizer(folder: Path, data: dict[str, Any] | None = None, **files: Any) -> Path:
    """tokenizer.json and other JSON files in a folder; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"tokenizer": data or json_tokenizer(), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def llama2c_tokenizer(*pieces: str) -> Llama2cTokenizer:
    """The control and byte pieces, 259 of them, and others, the first of which joins first."""
    first = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    scores = [0.0] * len(first) + [-float(i) for i in range(len(pieces))]
    return Llama2cTokenizer([*first, *(piece.encode() for piece in pieces)], scores)


def small_model(vocab_size: int, **changes: Any) -> LoadedModel:
    """A random model of 16 positions."""
    config = ModelConfig(8, 1, 2, 16, vocab_size, 16, rope_layout="interleaved")
    return LoadedModel(config, Model(config).init_weights(0).state_dict(), **changes)


def write_model(path: Path, vocab_size: int, **changes: Any) -> Path:
    """A small random model: a llama2.c file where `path` ends in .bin, else a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(small_model(vocab_size, **changes), path, "llama2c" if path.suffix == ".bin" else "hf")
    return path
