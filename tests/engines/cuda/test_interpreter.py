"""The stages, their engine and generation through Triton's interpreter: interpreted.py,
interpreted_engine.py and interpreted_decoding.py, each in processes of its own."""

from pathlib import Path

import pytest

from tests.interpreting import run_interpreted

pytestmark = pytest.mark.extended


def test_the_stages_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted.py"))


def test_the_engine_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_engine.py"))


def test_generation_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_decoding.py"))
