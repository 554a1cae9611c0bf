"""The stages on a GPU, a launch each, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from onelaunch.engines.cuda.staged import StagedForward
from onelaunch.model import Model
from tests.engines.suite import SHAPES, SMALL, exact_logits, relative_error, weights_of

CUDA = torch.device("cuda", 0)
MORE = {
    "no power of two": SMALL.with_(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67),
    "heads of 6": SMALL.with_(head_dim=6, n_kv_heads=2),
    "heads of 48, longer": SMALL.with_(
        dim=288, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=500,
        max_seq_len=300,
    ),
    "heads of 128": SMALL.with_(dim=256, n_heads=4, n_kv_heads=2, head_dim=128, max_seq_len=100),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _memory_is_poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])
def test_logits_are_the_models(config, dtype):
    weights = weights_of(config)
    forward = StagedForward(config, weights, dtype, CUDA)
    own = Model.from_weights(config, {name: w.to(CUDA, dtype) for name, w in weights.items()})
    for batch, sequence in ((1, 1), (3, 17), (2, config.max_seq_len)):
        generator = torch.Generator().manual_seed(sequence)
        tokens = torch.randint(config.vocab_size, (batch, sequence), generator=generator)
        exact = exact_logits(config, weights, tokens)
        with torch.no_grad():
            hidden = own.hidden(tokens.to(CUDA))
            plain = torch.nn.functional.linear(hidden, own.head_weight())
        got = forward.logits(tokens)
        # of float32, PyTorch's own error is a few roundings
        allowed = max(1.5 * relative_error(plain, exact), 2e-6)
        error = relative_error(got, exact)
        assert error <= allowed, f"{batch}x{sequence}: {error:.2e}, {allowed:.2e} allowed"
        assert torch.equal(forward.logits(tokens), got)
        assert torch.equal(forward.logits(tokens, all_positions=False), got[:, -1:])
