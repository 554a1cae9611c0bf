"""nanoGPT's own train.py on characters of Shakespeare, from a checkout.

The files that it needs are copied to a folder, with the text as its prepare.py leaves it. With
`whole_split` the copy of train.py has another `estimate_loss`: the published one averages random
batches of both splits, 200 of each; the other one takes the whole validation split, in windows of
the context that do not overlap. Its batches lie on the device from the start and have the shape of
training batches, the last one filled up with targets that do not count, so that torch.compile
compiles no other shape. The training loop is the published one.
"""

from __future__ import annotations

import pickle
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

from onelaunch.checkpoints.atomic import read_bytes
from onelaunch.errors import BadInput

NAME = "nanogpt"
TEXT = Path("data/shakespeare_char/input.txt")
CONFIG = "config/train_shakespeare_char.py"
FILES = ("train.py", "model.py", "configurator.py", CONFIG)
MAX_BYTES = 1 << 20
IGNORED_TARGETS = "ignore_index=-1"
"""Part of model.py: such targets do not count in a batch's mean loss."""

PUBLISHED = """\
@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ['train', 'val']:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            X, Y = get_batch(split)
            with ctx:
                logits, loss = model(X, Y)
            losses[k] = loss.item()
        out[split] = losses.mean()
    model.train()
    return out
"""
WHOLE_SPLIT = """\
def whole_split():
    data = np.fromfile(os.path.join(data_dir, 'val.bin'), dtype=np.uint16).astype(np.int64)
    n, tokens = len(data) - 1, batch_size * block_size
    X, Y = np.zeros(-(-n // tokens) * tokens, np.int64), np.full(-(-n // tokens) * tokens, -1)
    X[:n], Y[:n] = data[:-1], data[1:]
    batches = zip(*(torch.from_numpy(z).view(-1, batch_size, block_size) for z in (X, Y)))
    return [(x.to(device), y.to(device), (y != -1).sum().item()) for x, y in batches]

val_batches = whole_split()

@torch.no_grad()
def estimate_loss():
    model.eval()
    total = torch.zeros((), device=device)
    for X, Y, count in val_batches:
        with ctx:
            logits, loss = model(X, Y)
        total += loss * count
    model.train()
    n = sum(count for X, Y, count in val_batches)
    return {'train': math.nan, 'val': total.item() / n}
"""


def prepare(source: Path, folder: Path, whole_split: bool) -> list[str]:
    """Copy a checkout's files and its text into a folder; returns the command, without options, to
    be run there. Raises BadInput where a file cannot be read, or where it is to evaluate the
    `whole_split` and is not the version whose evaluation is known."""
    files = {name: read_bytes(source / name, MAX_BYTES, "a file of nanoGPT") for name in FILES}
    if whole_split:
        files["train.py"] = _with_whole_split(files["train.py"], source)
        if IGNORED_TARGETS.encode() not in files["model.py"]:
            raise BadInput(
                f"{source / 'model.py'}: has no {IGNORED_TARGETS}, which the evaluation of the "
                "whole split needs; check out a newer nanoGPT"
            )
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    _write_tokens((source / TEXT).read_text(encoding="utf-8"), folder / TEXT.parent)
    return [sys.executable, "train.py", CONFIG]


def _with_whole_split(train_py: bytes, source: Path) -> bytes:
    published = PUBLISHED.encode()
    if train_py.count(published) != 1:
        raise BadInput(
            f"{source / 'train.py'}: its estimate_loss is not the one that is to be replaced; "
            "check out nanoGPT's master of 2025"
        )
    return train_py.replace(published, WHOLE_SPLIT.encode())


def _write_tokens(text: str, folder: Path) -> None:
    """The first nine tenths of a text as train.bin, the rest as val.bin, and their alphabet."""
    folder.mkdir(parents=True)
    letters: Sequence[str] = sorted(set(text))
    numbers = {letter: i for i, letter in enumerate(letters)}
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        (folder / f"{name}.bin").write_bytes(array("H", [numbers[c] for c in part]).tobytes())
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": numbers}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
