"""Whole micro-steps of the CUDA engine through Triton's interpreter, on CPU tensors. Run by
test_interpreter.py in a process of its own."""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.engines.cuda.training import step as steps  # noqa: E402
from onelaunch.engines.cuda.training.flat import FlatParameters  # noqa: E402
from onelaunch.engines.cuda.training.step import TrainingStep  # noqa: E402
from onelaunch.model import Model  # noqa: E402
from tests.engines.suite import SMALL  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()

CONFIGS = {
    "grouped": SMALL.with_(n_kv_heads=2),
    "norms of heads, untied": SMALL.with_(qk_norm=True, tied_embeddings=False, head_dim=16),
    "halves": SMALL.with_(rope_layout="half", hidden_dim=88),
}


def trained(config, weights, batches, scales, dtype=torch.float32):
    """The losses and gradients of micro-steps from nothing."""
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    flat = FlatParameters(config, parameters, dtype)
    flat.gradients_M.fill_(float("nan"))
    flat.refresh()
    sequences, length = batches[0][0].shape
    step = TrainingStep(config, flat, sequences, length)
    losses = []
    with torch.no_grad():
        for i, ((tokens, targets), scale) in enumerate(zip(batches, scales, strict=True)):
            step.load(tokens, targets, scale)
            step.forward()
            losses.append(step.loss(i > 0).item())
            step.backward(i > 0)
    return losses, {name: flat.gradient(name) for name in weights}, step


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_two_micro_steps_are_autograds(name, dtype, monkeypatch):
    monkeypatch.setattr(steps, "LOGITS", 1)  # chunks of 128 rows
    config = CONFIGS[name].with_(n_layers=2, max_seq_len=80)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 + (len(s) == 1) for k, s in config.weight_shapes().items()}
    batches = [torch.randint(0, config.vocab_size, (2, 3, 50)).unbind() for _ in range(2)]
    batches[1][1][1, 30:] = -1
    scales = (0.25, 0.75)
    losses, gradients, step = trained(config, weights, batches, scales, dtype)
    exact = Model.from_weights(config, {k: v.double() for k, v in weights.items()})
    exact.requires_grad_(True)
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    for (tokens, targets), scale, loss in zip(batches, scales, losses, strict=True):
        of_exact = exact.loss(tokens, targets)
        (of_exact * scale).backward()
        assert loss == pytest.approx(of_exact.item(), rel=tolerance / 10)
    for key, parameter in exact.named_parameters():
        assert parameter.grad is not None
        error = (gradients[key].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, (key, error)
    total = step.loss_sum().item()
    assert total == pytest.approx(losses[1] * int((batches[1][1] >= 0).sum()), rel=1e-5)


def test_the_same_bits_again():
    config = CONFIGS["grouped"].with_(n_layers=1)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    batch = torch.randint(0, config.vocab_size, (2, 2, 7)).unbind()
    first, again = (trained(config, weights, [batch], [1.0])[1] for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in weights)
