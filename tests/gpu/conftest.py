"""These tests need an NVIDIA GPU and skip, visibly, without one."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no NVIDIA GPU here; run on one: make test-gpu")
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(skip)
