"""The kernels through Triton's interpreter: interpreted.py, in a process of its own."""

from pathlib import Path

import pytest

from tests.interpreting import run_interpreted


@pytest.mark.extended
def test_the_kernels_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted.py"))
