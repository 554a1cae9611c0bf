"""Two processes with a GPU each, whose gradients go through NCCL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onelaunch.training import run as runs
from tests.metrics import read_metrics
from tests.training.rank_work import recipe
from tests.training.test_ranks import equal_losses, losses, words

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
CHANGED = {"train__accum": 2, "train__updates": 6, "train__dropout": 0.0, "train__device": "cuda"}
FLOAT32 = {"train__dtype": "float32", "train__norm": "torch"}


def torchrun(run: Path, **changed) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "--", "onelaunch"]
    done = subprocess.run(
        [*command, *words(run, **CHANGED, **changed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["reference", "cuda"])
def test_two_gpus_equal_one(engine, tmp_path):
    how = FLOAT32 | {"train__engine": engine}
    torchrun(tmp_path / "two", **how)
    one = recipe(**CHANGED | how | {"train__accum": 4, "eval__every": 7, "eval__batches": 2})
    runs.start(one, tmp_path / "one", quiet=True)
    equal_losses(tmp_path / "two", tmp_path / "one", 1e-5)
    first = read_metrics(tmp_path / "two" / "metrics.jsonl")[0]
    assert (first["ranks"], first["device"]) == (2, "cuda:0")


@pytest.mark.parametrize("engine", ["reference", "cuda"])
def test_a_repeated_run_has_the_same_bits(engine, tmp_path):
    for name in ("first", "again"):
        torchrun(tmp_path / name, train__engine=engine)
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
