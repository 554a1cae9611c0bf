"""PyTorch's generation with a static cache writes what the model's definition does."""

import pytest
import torch

from onelaunch.bench.peers.decoding import BareDecoding, transformers_generate
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.generation.decode import generate_ids
from tests.engines.suite import SHAPES, weights_of


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_it_writes_what_the_reference_engine_does(config):
    weights = weights_of(config)
    prompts = torch.randint(config.vocab_size, (2, 5), generator=torch.manual_seed(4))
    expected = generate_ids(
        ReferenceEngine(config, weights, "cpu"), prompts.tolist(), 9, Sampling()
    )
    peer = BareDecoding(config, weights, torch.float32, torch.device("cpu"), 2, 20)
    for _ in range(2):  # the second time from a cache that holds the first
        assert peer.generate(prompts, 9, peer.step).tolist() == expected


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_transformers_writes_as_many_tokens(config):
    pytest.importorskip("transformers")
    prompts = torch.randint(config.vocab_size, (2, 5), generator=torch.manual_seed(4))
    generate = transformers_generate(config, torch.float32, torch.device("cpu"), prompts)
    assert generate(9).shape == (2, 14)
