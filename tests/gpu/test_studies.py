"""The studies' training on the CUDA engine: times of updates, of parts and of first micro-steps."""

import pytest

from onelaunch.bench.studies.ane_mega_kernel import program_training, warm_up
from onelaunch.bench.studies.ane_mega_kernel.step_breakdown.step_parts import (
    BACKWARD,
    HEAD,
    UNEXPLAINED,
    WHOLE,
    engine_parts,
)

MODEL, SEQUENCE = "stories260k", 64


@pytest.fixture
def training():
    with program_training.engine_driver(MODEL, SEQUENCE, "cuda") as training:
        yield training


def test_auto_is_the_cuda_engine_beside_pytorch():
    with program_training.pytorch_and_engine(MODEL, SEQUENCE, "cuda", print) as trainings:
        assert list(trainings) == ["PyTorch", "CUDA engine"]
        engine = trainings["CUDA engine"].engine
        assert engine.describe()["engine"] == program_training.own_engine(MODEL, "cuda") == "cuda"


def test_an_update_is_timed_by_events(training):
    updates = training.updates(3, 4)
    assert len(updates) == 4
    for update in updates:
        assert 0 < update.optimizer_seconds < update.seconds < 1
        assert update.stall_seconds == 0


def test_parts_add_up(training):
    for _ in range(program_training.WARM_UPDATES):
        engine_parts(training, 3, True)
    seconds, threads = engine_parts(training, 3, True)
    whole = seconds.pop(WHOLE)
    assert sum(seconds.values()) == pytest.approx(whole, rel=1e-3)
    assert abs(seconds[UNEXPLAINED]) < 0.02 * whole
    assert {"data", "forward: layers", HEAD, BACKWARD["cuda"], "optimizer"} < seconds.keys()
    assert threads == {}
    assert engine_parts(training, 3, False)[0].keys() == {WHOLE}


def test_captures_are_seen_in_the_first_micro_steps():
    with program_training.engine_driver(MODEL, SEQUENCE, "cuda", warm=False) as training:
        times = warm_up._measure(training, 20, 1, 20)
    first, (after,) = times["first"], times["after"]
    assert first[2] > 2 * warm_up.end_of(first)  # the third captures
    assert after[0] > 2 * warm_up.end_of(after)
