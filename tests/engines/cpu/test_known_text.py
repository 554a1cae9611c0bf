"""A real model: stories260K writes the known 256 tokens, at every fusion depth."""

from pathlib import Path

import pytest

from onelaunch.checkpoints import load
from onelaunch.engines.engine import Sampling
from onelaunch.generation.decode import generate_ids
from onelaunch.plan import every_depth
from tests.engines.cpu.making import make_engine

WEIGHTS = Path(__file__).parents[3] / ".." / "shared" / "weights"
MODEL, IDS = WEIGHTS / "stories260K.bin", WEIGHTS / "stories260K_greedy_ids_n256.txt"

pytestmark = [
    pytest.mark.usefixtures("compiled_program"),
    pytest.mark.skipif(
        not MODEL.exists(), reason="the trained model stories260K.bin is not beside the repository"
    ),
]


@pytest.mark.parametrize("threads", [1, 2, None])
@pytest.mark.parametrize("depth", ["auto", *every_depth(5)])
def test_the_known_text(depth, threads):
    model = load(MODEL)
    engine = make_engine(model.config, model.weights, fusion_depth=depth, threads=threads)
    expected = [int(token) for token in IDS.read_text().split()]
    assert generate_ids(engine, [[1]], 256, Sampling()) == [expected]
