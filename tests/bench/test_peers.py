"""The peers do the same work as ours: otherwise their times say nothing."""

import pytest
import torch

from onelaunch.bench.generation_speed import BareLoop
from onelaunch.bench.peers.forward import BareForward
from onelaunch.bench.rig import trainer as bench_trainer
from onelaunch.bench.training_speed import bare_updates
from onelaunch.config import preset
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.training.recipe import Recipe
from tests.engines.suite import SHAPES, exact_logits, relative_error, weights_of


@pytest.mark.parametrize("prompt", [[1], [1, 40, 7, 300]])
def test_the_bare_generation_loop_writes_our_tokens(prompt):
    config = preset("stories260k")
    generator = torch.Generator().manual_seed(5)
    shapes = config.weight_shapes().items()
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}
    ours = ReferenceEngine(config, weights, device="cpu").generate([prompt], 40, Sampling())[0]
    assert BareLoop(config, weights).generate(prompt, 40) == ours
    assert len(set(ours)) > 5


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_bare_forward_has_the_models_logits(config):
    weights = weights_of(config)
    tokens = torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    got = BareForward(config, weights, torch.float64, torch.device("cpu"))(tokens)
    assert relative_error(got, exact_logits(config, weights, tokens)) < 1e-6


def test_the_bare_training_loop_learns_as_ours_does():
    settings = {
        "model.preset": "stories260k",
        "model.n_layers": 2,
        "model.max_seq_len": 32,
        "train.batch_size": 8,
        "train.updates": 10**6,
        "optimizer.warmup": 0,
        "optimizer.lr": 3e-3,
    }
    with bench_trainer(Recipe().with_settings(settings, "test")) as trainer:
        bare = bare_updates(trainer)
        losses = []
        for _ in range(40):
            trainer._update()
            losses.append(bare())
        trainer.metrics.flush()
        lines = (trainer.run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert losses[0] == pytest.approx(6.7, abs=0.7)
    assert losses[-1] < 0.75 * losses[0]
