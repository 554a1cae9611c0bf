"""The peers do the same work as ours: otherwise their times say nothing."""

import pytest
import torch

from onelaunch.bench.core.rig import trainer as bench_trainer
from onelaunch.bench.engines.generation_speed import BareLoop, common_tokens
from onelaunch.bench.peers.forward import BareForward
from onelaunch.bench.peers.training import bare_updates
from onelaunch.config import preset
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids
from onelaunch.training.recipe import Recipe
from tests.engines.suite import SHAPES, exact_logits, relative_error, weights_of


@pytest.mark.parametrize("prompt", [[1], [1, 40, 7, 300]])
def test_the_bare_generation_loop_writes_our_tokens(prompt):
    config = preset("stories260k")
    generator = torch.Generator().manual_seed(5)
    shapes = config.weight_shapes().items()
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}
    ours = generate_ids(ReferenceEngine(config, weights, device="cpu"), [prompt], 40, Sampling())[0]
    assert BareLoop(config, weights).generate(prompt, 40) == ours
    assert len(set(ours)) > 5


class Likes:
    """Logits in an engine's place: after token 1 it likes 2 and, a little less, 3; else 4."""

    def __init__(self, less):
        self.likes = torch.zeros(6)
        self.likes[2], self.likes[3], self.likes[5] = 1, 1 - less, -1

    def logits(self, tokens_BS):
        last = tokens_BS[0, :, None]
        return torch.where(last == 1, self.likes, torch.eye(6)[4])[None]


@pytest.mark.parametrize(
    ("ours", "theirs", "less", "alike"),
    [
        ([2, 4], [2, 4], 1, 2),
        ([2, 4], [3, 4], 1e-4, 0),  # of a spread of 2
        ([3, 4, 4], [2, 4, 4], 0, 0),
    ],
)
def test_texts_that_part_at_a_near_tie_are_of_one_model(ours, theirs, less, alike):
    assert common_tokens("m", Likes(less), torch.float32, ours, theirs) == alike


@pytest.mark.parametrize(
    ("ours", "theirs", "less", "message"),
    [
        ([2, 4], [3, 4], 3e-4, "the bare loop writes 3 as token 0, 1.5e-04 of"),
        ([3, 4], [2, 4], 3e-4, "the engine writes 3 as token 0"),
        ([2, 4], [3, 2], 0, "the bare loop writes 2 as token 1"),
        ([2, 4], [3, 4], torch.nan, "the engine writes 2 as token 0, nan"),
        ([2, 4], [2], 0, "the engine writes 2 tokens, the loop 1"),
    ],
)
def test_a_token_that_the_engine_would_not_write_is_told(ours, theirs, less, message):
    with pytest.raises(RunFailed, match=message):
        common_tokens("m", Likes(less), torch.float32, ours, theirs)


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
