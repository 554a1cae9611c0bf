"""The CPU engine: the shared suite in its compiled form, at every depth, thread count and dtype."""

import pytest

from onelaunch.engines.cpu.engine import CpuEngine
from tests.engines.suite import EngineSuite

pytestmark = pytest.mark.usefixtures("compiled_program")


def engine(config, weights, **options) -> CpuEngine:
    made = CpuEngine(config, weights, **options)
    assert made.wait(60), made.failed
    return made


class TestCpu(EngineSuite):
    def make(self, config, weights):
        return engine(config, weights)
