"""These tests need an NVIDIA GPU and skip, visibly, without one.

Several processes may share it (pytest-xdist): those that need most of its memory run in one of
them, and a process that has held much gives it back after the test.
"""

import pytest
import torch

MUCH = 2 * 2**30
# Tests that hold tens of GiB, beside those that ask for `much_memory`.
LARGE = ("test_dw_of_a_million_rows", "test_offsets_within_are_64_bit")


def pytest_configure(config):
    # pytest-xdist's own, where that is not installed
    config.addinivalue_line("markers", "xdist_group(name): tests that run in one process")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        if "much_memory" in item.fixturenames or item.originalname in LARGE:
            item.add_marker(pytest.mark.xdist_group("much-memory"))
        if not torch.cuda.is_available():
            item.add_marker(
                pytest.mark.skip(reason="no NVIDIA GPU here; run on one: make test-gpu")
            )


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > MUCH:
        torch.cuda.empty_cache()
