"""The CPU engine: the shared suite in its compiled form, by several threads, in separate calls,
with bfloat16 weights. What is its own is tested in the folder `cpu`."""

import pytest
import torch

from onelaunch.engines.engine import Sampling
from onelaunch.model import Model
from tests.engines.cpu.making import make_engine
from tests.engines.suite import (
    EngineSuite,
    every_shape,
    exact_logits,
    greedy_by_recomputing,
    relative_error,
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

    @every_shape
    @pytest.mark.parametrize("size", [(1, 1), (3, 7)])
    def test_logits_are_as_exact_as_plain_pytorch(self, config, size):
        weights = rounded(weights_of(config))
        tokens = torch.randint(
            0, config.vocab_size, size, generator=torch.Generator().manual_seed(1)
        )
        exact = exact_logits(config, weights, tokens)
        plain = Model.from_weights(config, weights)(tokens)
        logits = self.make(config, weights_of(config)).logits(tokens)
        assert relative_error(logits, exact) <= 1.5 * relative_error(plain, exact)

    @every_shape
    def test_greedy_equals_reading_the_whole_text_anew(self, config):
        made = self.make(config, weights_of(config))
        expected = greedy_by_recomputing(config, rounded(weights_of(config)), [5, 17, 3], 12)
        assert made.generate([[5, 17, 3]], 12, Sampling()) == [expected]
