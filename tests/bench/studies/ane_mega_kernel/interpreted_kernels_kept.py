"""The children of cache and compile-budget on a GPU without one, through Triton's interpreter. Run
by test_kernels_kept.py in a process of its own."""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.bench.studies.ane_mega_kernel.cache import cuda_child as cache_cuda_child  # noqa: E402
from onelaunch.bench.studies.ane_mega_kernel.compile_budget import cuda_child as budget  # noqa: E402
from onelaunch.engines.cuda import engine as engine_module  # noqa: E402
from tests.engines.suite import SMALL  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_on_the_cpu(monkeypatch):
    monkeypatch.setattr(engine_module, "why_not", lambda device, config: None)
    for module in (cache_cuda_child, budget):
        monkeypatch.setattr(module, "DTYPE", "float32")
        monkeypatch.setattr(module, "SEQUENCE", 8)
    monkeypatch.setattr(budget, "LAYER", SMALL)
    monkeypatch.setattr(budget, "LAYERS", SMALL)


def test_first_logits_are_digested_and_compared_with_pytorchs():
    results = [cache_cuda_child.first_logits(SMALL, CPU, seed) for seed in (0, 0, 1)]
    assert [each["error"] for each in results] == ["", "", ""]
    assert all(each["apart"] < 1e-5 and each["seconds"] > 0 for each in results)
    assert results[0]["digest"] == results[1]["digest"] != results[2]["digest"]


def test_what_is_raised_is_told(monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("an illegal\ninstruction")

    monkeypatch.setattr(cache_cuda_child.CudaEngine, "logits", broken)
    result = cache_cuda_child.first_logits(SMALL, CPU, 0)
    assert (result["error"], result["digest"]) == ("RuntimeError: an illegal instruction", "")


def test_kernels_and_new_weights_are_counted(monkeypatch):
    for what in (budget.distinct, budget.again):
        result = what(2, CPU)
        assert len(result["seconds"]) == len(result["bytes"]) == len(result["gpu_bytes"]) == 2
        assert (result["failures"], result["compilations"]) == (0, 0)  # nothing is compiled here
    monkeypatch.setattr(budget, "_logits", lambda device, seed: torch.ones(1))
    assert budget.again(2, CPU)["failures"] == 2  # as the weights before
    monkeypatch.setattr(budget, "_launch", lambda target, number: 1 // (number - 1))
    assert budget.distinct(2, CPU)["failures"] == 1


def test_layers_in_one_launch(monkeypatch):
    result = budget.layers(3, CPU)
    assert (result["refused"], result["operations"]) == ("", 17)
    assert result["apart_from_pytorch"] < 1e-5
    monkeypatch.setattr(budget, "MOST_APART", 0.0)
    assert "from PyTorch's" in budget.layers(1, CPU)["refused"]


def test_a_fresh_process_says_when_it_began():
    result = budget.restart(5, CPU)
    assert result["until_first"] > result["second"] > 0
