"""The CPU engine: the shared suite in its compiled form, by several threads, in separate calls,
with bfloat16 weights. What is its own is tested in the folder `cpu`."""

import pytest

from onelaunch.engines.engine import Sampling
from onelaunch.generation.decode import generate_ids
from tests.engines.cpu.making import make_engine
from tests.engines.suite import (
    EngineSuite,
    every_shape,
    greedy_by_recomputing,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("compiled_program")


def rounded(weights):
    """As the engine has them: matrices in bfloat16, norms as they are."""
    return {name: w.bfloat16().float() if w.dim() == 2 else w for name, w in weights.items()}


class TestCpu(EngineSuite):
    def make(self, config, weights):
        return make_engine(config, weights)


class TestOneThread(EngineSuite):
    def make(self, config, weights):
        return make_engine(config, weights, threads=1)


class TestMoreThreadsThanCores(EngineSuite):
    def make(self, config, weights):
        return make_engine(config, weights, threads=3)


class TestStageByStage(EngineSuite):
    def make(self, config, weights):
        return make_engine(config, weights, threads=2, fusion_depth="stage")


class TestBfloat16(EngineSuite):
    """Against the rounded weights, in float64: the bounds are those of float32."""

    def make(self, config, weights):
        return make_engine(config, weights, threads=2, dtype="bfloat16")

    def held(self, weights):
        return rounded(weights)

    @every_shape
    def test_greedy_equals_reading_the_whole_text_anew(self, config):
        made = self.make(config, weights_of(config))
        expected = greedy_by_recomputing(config, rounded(weights_of(config)), [5, 17, 3], 12)
        assert generate_ids(made, [[5, 17, 3]], 12, Sampling()) == [expected]
