"""How an engine is asked for from Python."""

import pytest
import torch

from onelaunch.engines import cuda
from onelaunch.engines.choice import automatic_for_evaluation, choose
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from tests.engines.suite import SMALL, weights_of


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_pytorchs_own(dtype):
    engine = choose("reference", SMALL, weights_of(SMALL), "cpu", dtype)
    assert isinstance(engine, ReferenceEngine)
    assert engine.dtype == torch.bfloat16


def test_a_dtype_that_no_engine_has_is_named():
    with pytest.raises(BadInput, match="^dtype='float64': must be one of"):
        choose("reference", SMALL, weights_of(SMALL), "cpu", torch.float64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "vulkan"}, "^engine='vulkan': must be auto, reference, cpu, cuda or coreml$"),
        ({"engine": "cuda", "threads": 2}, "^threads=2: the CUDA engine"),
        ({"engine": "coreml", "threads": 2}, "^threads=2: engine='coreml' evaluates"),
        (
            {"engine": "reference", "fusion_depth": "half"},
            "^fusion_depth='half': .*; use engine='cpu', or engine='cuda' on a GPU$",
        ),
    ],
)
def test_what_is_wrong_is_named_as_python_does(arguments, message):
    with pytest.raises(BadInput, match=message):
        choose(config=SMALL, weights=weights_of(SMALL), **arguments)


@pytest.mark.parametrize(
    ("device", "dtype", "threads", "missing", "engine"),
    [
        ("cpu", "float32", None, None, "reference"),
        ("cuda", "float32", None, None, "cuda"),
        ("cuda", "bfloat16", None, None, "cuda"),
        ("cuda", "float64", None, None, "reference"),
        ("cuda", "float32", 2, None, "reference"),
        ("cuda", "float32", None, "no compiler", "reference"),
    ],
)
def test_batches_are_evaluated_by_the_gpus_engine_or_pytorch(
    monkeypatch, device, dtype, threads, missing, engine
):
    monkeypatch.setattr(cuda, "why_not", lambda device, config: missing)
    assert automatic_for_evaluation(torch.device(device), SMALL, dtype, threads) == engine
