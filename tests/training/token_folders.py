"""Small valid data folders, and a reader that uses what they hold: for tests and for fuzzing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.checkpoints.tokenizers import BytesTokenizer
from onelaunch.training.data import open_data

SEQ_LEN = 8


def make_folder(
    folder: Path, n_train: int = 100, n_val: int = 30, changes: dict[str, Any] | None = None
) -> Path:
    """A folder of bytes tokens, as `prepare` would write it: ids 3, 4, 5, ... in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BytesTokenizer()
    splits = {}
    for name, n in (("train", n_train), ("val", n_val)):
        data = (3 + np.arange(n) % 256).astype("<u2").tobytes()
        (folder / f"{name}.bin").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        splits[name] = {
            "file": f"{name}.bin",
            "tokens": n,
            "bytes": n,
            "documents": 1,
            "sha256": digest,
        }
    manifest = {
        "schema": 1,
        "dtype": "uint16",
        "vocab_size": 259,
        "bos_id": 1,
        "tokenizer": {
            "kind": "bytes",
            "file": tokenizer.save(folder).name,
            "fingerprint": tokenizer.fingerprint,
        },
        "synthetic": False,
        "splits": splits,
        "sources": [{"file": "a.txt", "bytes": n_train + n_val, "sha256": "0" * 64}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | (changes or {})))
    return folder


def make_manifest(folder: Path) -> Path:
    """A valid folder; its manifest is the file to damage."""
    return make_folder(folder) / "manifest.json"


def make_tokens(folder: Path) -> Path:
    """A valid folder; its training tokens are the file to damage."""
    return make_folder(folder) / "train.bin"


def use(path: Path) -> None:
    """Open the folder that the file lies in, and read all of it in every way."""
    data = open_data(str(path.parent), seed=1)
    sampler = data.train(SEQ_LEN, seed=1)
    for _ in range(4):
        tokens_BS, targets_BS = sampler.next(5)
        assert tokens_BS.shape == targets_BS.shape == (5, SEQ_LEN)
    sampler.load_state_dict(sampler.state_dict())
    for split in ("train", "val"):
        for tokens_BS, _ in data.eval_batches(split, SEQ_LEN, 3):
            assert tokens_BS.min() >= 0
            assert tokens_BS.max() < data.vocab_size
        data.bytes_of(split)
