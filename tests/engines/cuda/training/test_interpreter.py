"""The kernels of a training step through Triton's interpreter: interpreted.py, in processes of its
own."""

from pathlib import Path

import pytest

from tests.interpreting import run_interpreted


@pytest.mark.extended
def test_the_kernels_of_a_training_step_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted.py"))
