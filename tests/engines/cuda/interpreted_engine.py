"""The CUDA engine through Triton's interpreter, on CPU tensors in float32: the shared suite. Run by
test_interpreter.py in a process of its own."""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.engines.cuda import engine as engine_module  # noqa: E402
from onelaunch.engines.cuda.engine import CudaEngine  # noqa: E402
from onelaunch.engines.reference import ReferenceEngine  # noqa: E402
from tests.engines.suite import (  # noqa: E402
    SMALL,
    EngineSuite,
    relative_error,
    weights_of,
)
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()


@pytest.fixture(autouse=True)
def _the_interpreter_counts_as_a_gpu(monkeypatch):
    monkeypatch.setattr(engine_module, "why_not", lambda device, config: None)


class TestStaged(EngineSuite):
    rows, floor = 21, 4e-6

    def make(self, config, weights):
        return CudaEngine(config, weights, "cpu", "float32")


@pytest.mark.parametrize("depth", ["stage", "half", 1, "2", "all"])
def test_a_depth_by_hand_answers(depth):
    weights = weights_of(SMALL)
    engine = CudaEngine(SMALL, weights, "cpu", "float32", depth)
    reference = ReferenceEngine(SMALL, weights, "cpu")
    for seed in range(2):
        tokens = torch.randint(61, (2, 9), generator=torch.manual_seed(seed))
        assert relative_error(engine.logits(tokens), reference.logits(tokens)) < 1e-5
    form = "staged" if depth == "stage" else str(depth)
    assert engine.describe()["forms"] == {"2x9": {"form": form}}
