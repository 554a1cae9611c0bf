"""nanoGPT: its files and text in a folder, and the evaluation of the whole split, on a stand-in."""

from __future__ import annotations

import math
import pickle
import subprocess
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onelaunch.bench.peers import nanogpt
from onelaunch.errors import BadInput


def nanogpt_checkout(source, text):
    """A folder with the files of a checkout that are read, and a text."""
    (source / "config").mkdir(parents=True)
    for name in nanogpt.FILES:
        (source / name).write_text(f"# {name}\n")
    (source / "train.py").write_text(f"# before\n{nanogpt.PUBLISHED}# after\n")
    (source / "model.py").write_text(f"# {nanogpt.IGNORED_TARGETS}\n")
    path = source / nanogpt.TEXT
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return source


@pytest.fixture
def checkout(tmp_path):
    return nanogpt_checkout(tmp_path / "checkout", "abcabcabca" * 10)


def test_its_text_is_split_and_numbered(checkout, tmp_path):
    command = nanogpt.prepare(checkout, tmp_path / "place", whole_split=False)
    assert command[1:] == ["train.py", "config/train_shakespeare_char.py"]
    data = tmp_path / "place" / nanogpt.TEXT.parent
    meta = pickle.loads((data / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 3
    assert meta["itos"][meta["stoi"]["b"]] == "b"
    ids = np.concatenate([np.fromfile(data / f"{n}.bin", np.uint16) for n in ("train", "val")])
    assert len(np.fromfile(data / "val.bin", np.uint16)) == 10
    assert "".join(meta["itos"][i] for i in ids) == "abcabcabca" * 10


def test_only_the_evaluation_is_replaced(checkout, tmp_path):
    nanogpt.prepare(checkout, tmp_path / "as it is", whole_split=False)
    nanogpt.prepare(checkout, tmp_path / "whole", whole_split=True)
    for name in nanogpt.FILES:
        there = (checkout / name).read_text()
        assert (tmp_path / "as it is" / name).read_text() == there
        if name != "train.py":
            assert (tmp_path / "whole" / name).read_text() == there
    expected = f"# before\n{nanogpt.WHOLE_SPLIT}# after\n"
    assert (tmp_path / "whole" / "train.py").read_text() == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.py", nanogpt.PUBLISHED.replace("eval_iters", "n_batches")),
        ("train.py", nanogpt.PUBLISHED * 2),
        ("model.py", "F.cross_entropy(logits, targets)"),
    ],
)
def test_another_version_is_refused(name, content, checkout, tmp_path):
    (checkout / name).write_text(content)
    with pytest.raises(BadInput, match=name):
        nanogpt.prepare(checkout, tmp_path / "place", whole_split=True)
    assert not (tmp_path / "place").exists()
    (checkout / name).unlink()
    with pytest.raises(BadInput, match=name):
        nanogpt.prepare(checkout, tmp_path / "place", whole_split=False)


@pytest.mark.parametrize("n_tokens", [2, 24, 25, 26, 61])
def test_the_whole_split_is_its_mean_over_windows(n_tokens, tmp_path):
    """Windows of 4, six of them in two batches of 3: one that is full, and what is left over."""
    ids = np.random.default_rng(1).integers(0, 5, n_tokens).astype(np.uint16)
    (tmp_path / "val.bin").write_bytes(ids.tobytes())
    table_VV = torch.randn(5, 5, generator=torch.manual_seed(2))

    class Bigram(torch.nn.Module):
        def forward(self, X, Y):
            assert X.shape == Y.shape == (3, 4)
            logits = table_VV[X]
            return logits, F.cross_entropy(logits.flatten(0, 1), Y.flatten(), ignore_index=-1)

    names = {
        "np": np, "os": __import__("os"), "math": math, "torch": torch, "device": "cpu",
        "data_dir": str(tmp_path), "batch_size": 3, "block_size": 4, "model": Bigram(),
        "ctx": nullcontext(),
    }  # fmt: skip
    exec(nanogpt.WHOLE_SPLIT, names)
    losses = names["estimate_loss"]()
    tokens = torch.from_numpy(ids.astype(np.int64))
    expected = F.cross_entropy(table_VV[tokens[:-1]], tokens[1:])
    assert losses["val"] == pytest.approx(expected.item(), rel=1e-5)
    assert math.isnan(losses["train"])
    assert names["model"].training


def test_its_command_runs_in_its_folder(checkout, tmp_path):
    (checkout / "train.py").write_text("import sys; print('step 0: val loss 1.5', sys.argv[1])")
    command = nanogpt.prepare(checkout, tmp_path / "place", whole_split=False)
    done = subprocess.run(command, cwd=tmp_path / "place", capture_output=True, check=True)
    assert done.stdout.decode().split()[-1] == nanogpt.CONFIG
