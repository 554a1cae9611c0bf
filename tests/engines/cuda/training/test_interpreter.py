"""The kernels of a training step, whole steps and runs of them through Triton's interpreter, in
processes of their own."""

from pathlib import Path

import pytest

from tests.interpreting import run_interpreted


@pytest.mark.extended
def test_the_kernels_of_a_training_step_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted.py"))


@pytest.mark.extended
def test_steps_and_runs_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_step.py"))


@pytest.mark.extended
def test_products_with_swiglu_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_swiglu_products.py"))
