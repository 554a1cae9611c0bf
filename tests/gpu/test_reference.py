"""The shared engine suite on a GPU, in float32."""

from onelaunch.engines.reference import ReferenceEngine
from tests.engines.suite import EngineSuite


class TestReferenceOnCuda(EngineSuite):
    def make(self, config, weights):
        return ReferenceEngine(config, weights, device="cuda", dtype="float32")
