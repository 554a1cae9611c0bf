"""One block of every layer alone on a GPU, staged and in one launch, against its formula."""

from __future__ import annotations

import pytest
import torch

from onelaunch.engines.cuda.blocking import default_fused
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape
from onelaunch.plan import Launch
from tests.engines.cuda.staged_forward import StagedForward
from tests.engines.suite import SMALL, layers_alone, relative_error, weights_of

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
CONFIGS = {
    "heads of 48": SMALL.with_(
        dim=288, n_layers=3, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=500,
        max_seq_len=300,
    ),
    "no power of two": SMALL.with_(
        dim=40, n_layers=3, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67, max_seq_len=128
    ),
}  # fmt: skip
OF_LAYER = {"ffn": 2, "attention": 3}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def tokens_of(config, batch, sequence, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sequence)
    return torch.randint(config.vocab_size, (batch, sequence), generator=generator).to(CUDA)


def run(forward, tokens_BS, launch=None):
    b = forward.buffers
    b.x.fill_(float("nan"))
    b.partial_sumsq.fill_(float("nan"))
    b.tokens.copy_(tokens_BS.flatten())
    (launch or forward.run)()
    forward.check()
    return b.x.clone()


@pytest.mark.parametrize("part", OF_LAYER)
@pytest.mark.parametrize("size", [(1, 1), (1, 128), (3, 70)])
def test_a_part_is_what_its_formula_says_in_every_form(config, part, size):
    weights = {name: weight.to(CUDA) for name, weight in weights_of(config).items()}
    packed = StagedForward(config, weights, BF16, CUDA).packed
    shape = Shape(*size, part=part)
    blockings = default_fused(config, size[0] * size[1], BF16.itemsize)
    staged = BoundForward(config, packed, shape, blockings)
    otherwise = BoundForward(config, packed, shape, {})
    step = OF_LAYER[part]
    layer_by_layer = [Launch("", 0, 1 + step)]
    layer_by_layer += [Launch("", 1 + step * i, 1 + step * (i + 1)) for i in (1, 2)]
    forms = [FusedForward(config, packed, shape, {}, d) for d in ("stage", 1, 2, "all")]
    forms.append(FusedForward(config, packed, shape, {}, layer_by_layer))
    assert [len(form.calls) for form in forms] == [1 + 3 * step, 4, 3, 1, 3]
    for seed in range(3):
        tokens = tokens_of(config, *size, seed)
        expected = run(staged, tokens)
        for form in forms:
            assert torch.equal(run(form, tokens), expected)
        exact = layers_alone(config, weights, tokens, part)
        plain = layers_alone(config, weights, tokens, part, BF16)
        allowed = 1.5 * relative_error(plain, exact)
        for got in (expected, run(otherwise, tokens)):
            assert relative_error(got.view(exact.shape), exact) <= allowed


@pytest.mark.parametrize("part", [*OF_LAYER, "whole"])
def test_the_first_layers_alone_again_and_again_as_a_graph_too(part):
    config = CONFIGS["heads of 48"]
    step = OF_LAYER.get(part, 5)
    packed = StagedForward(config, weights_of(config), BF16, CUDA).packed
    shape = Shape(1, 128, part=part)
    staged = BoundForward(config, packed, shape, default_fused(config, 128, BF16.itemsize))
    fused = FusedForward(config, packed, shape, {}, [Launch("first two", 0, 1 + 2 * step)])
    fused.buffers.tokens.zero_()
    graph = fused.captured()

    def first_two():
        for call in staged.calls[: 1 + 2 * step]:
            call()

    for seed in range(5):
        tokens = tokens_of(config, 1, 128, seed)
        expected = run(staged, tokens, first_two)
        assert torch.equal(run(fused, tokens), expected)
        assert torch.equal(run(fused, tokens, graph.replay), expected)
