"""The training step for vectors of other widths than this processor's own: what others run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from onelaunch.engines.cpu import program
from onelaunch.engines.cpu.program import TrainingProgram
from onelaunch.engines.cpu.training.engine import CpuTrainer
from onelaunch.engines.reference import ReferenceEngine
from tests.engines.cpu.test_training import SHAPES, error, exact, gradients, random_batch
from tests.engines.suite import weights_of

WIDTHS = {"sse": (4, 16), "neon": (4, 32), "avx2": (8, 16), "avx512": (16, 32)}

BUILD = """
import json, sys
from onelaunch.engines.cpu.native.build import build
sys.stdout.buffer.write(build(json.loads(sys.argv[1]), "training"))
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.extended if name == "avx2" else pytest.mark.soak)
        for name in WIDTHS
    ],
)
def made(request):
    lanes, registers = WIDTHS[request.param]
    options = {**program.options(), "lanes": lanes, "registers": registers}
    command = [sys.executable, "-c", BUILD, json.dumps(options)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    ours = TrainingProgram(child.stdout)
    assert ours.lanes == lanes
    return ours


def test_gradients(made, monkeypatch):
    for name, config in SHAPES.items():
        weights, batch = weights_of(config), random_batch(config)
        trainer = CpuTrainer(config, weights, 2)
        monkeypatch.setattr(trainer, "_program", made)
        trainer.train_step(*batch)
        _, expected = exact(config, weights, batch)
        plain = ReferenceEngine(config, weights, "cpu", "float32", train=True)
        plain.train_step(*batch)
        ours = gradients(trainer)
        assert error(ours, expected) <= 2 * error(gradients(plain), expected), name
        assert all(torch.isfinite(gradient).all() for gradient in ours.values())
