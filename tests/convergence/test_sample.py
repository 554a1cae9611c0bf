"""A small sample of `make test-convergence`, and that its limits catch a norm that is not right."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onelaunch.model import rms_norm
from tests.convergence import llama

SHORT = replace(llama.SMALL.with_qk_norm(), updates=10)


@pytest.mark.extended
def test_the_kernels_train_as_torch_does_in_float32():
    """A process of its own: Triton chooses between interpreter and compiler when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, Path(__file__).with_name("run.py")]
    command += ["--updates", "4", "--dtype", "float32", "--model", "qk-norm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("good") == 1, done.stdout


def other_eps(x, weight, eps):
    return rms_norm(x, weight, 4 * eps)


def frozen_weight(x, weight, eps):
    return rms_norm(x, weight.detach(), eps)


def narrow_statistics(x, weight, eps):
    """Everything in bfloat16, the sum of squares too."""
    x = x.bfloat16()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.bfloat16()


def eager(x, weight, eps):
    """The formula, written out: another way to round the same."""
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


@pytest.mark.parametrize("wrong", [other_eps, frozen_weight])
def test_a_wrong_norm_is_caught_in_float32(wrong):
    plain = llama.losses(SHORT, "torch")
    assert llama.relative_difference(llama.losses(SHORT, eager), plain).max() <= llama.TOLERANCE
    assert llama.relative_difference(llama.losses(SHORT, wrong), plain).max() > llama.TOLERANCE


@pytest.mark.extended
def test_a_norm_that_is_too_coarse_is_caught_in_bfloat16():
    size = replace(SHORT, updates=40)
    plain = [llama.losses(size, "torch", dtype="bfloat16", noise=n) for n in range(6)]
    assert len({tuple(run.tolist()) for run in plain}) == 6, "one unit in the last place shows"
    coarse = llama.losses(size, narrow_statistics, dtype="bfloat16")
    assert llama.distance(coarse, plain) > llama.limit(plain)
