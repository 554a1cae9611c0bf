import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_conversion():
    """coremltools collects all garbage in each conversion: what is loaded already takes most of it,
    0.16 of 0.18 s for a tiny program."""
    gc.freeze()
    yield
    gc.unfreeze()
