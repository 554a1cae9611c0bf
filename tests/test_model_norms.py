"""The model with a norm that it is given: PyTorch's, the operator, or any other of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.norm import norm_function
from onelaunch.model import KVCache, Model, rms_norm
from tests.test_model import SHAPES, by_shape, error, random_tokens, random_weights


@by_shape
def test_every_norm_is_the_one_that_the_model_is_given(config: ModelConfig) -> None:
    seen: list[tuple[int, ...]] = []

    def noted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert weight.shape == x.shape[-1:]
        assert eps == config.norm_eps
        seen.append(tuple(x.shape))
        return rms_norm(x, weight, eps)

    weights, tokens = random_weights(config), random_tokens(config)
    model = Model.from_weights(config, weights, norm=noted)
    assert torch.equal(model(tokens), Model.from_weights(config, weights)(tokens))
    B, S = tokens.shape
    whole = (B, S, config.dim)
    heads = [(B, n, S, config.head_dim) for n in (config.n_heads, config.n_kv_heads)]
    layer = [whole, *(heads if config.qk_norm else []), whole]
    assert seen == layer * config.n_layers + [whole]
    assert list(model.state_dict()) == list(Model(config).state_dict())


@by_shape
@pytest.mark.filterwarnings("ignore:.*plain")
def test_the_operator_as_the_models_norm(config: ModelConfig) -> None:
    weights, tokens = random_weights(config), random_tokens(config)
    exact = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    plain = Model.from_weights(config, weights)
    ours = Model.from_weights(config, weights, norm=norm_function("onelaunch"))
    losses = [m.requires_grad_(True).loss(tokens, tokens) for m in (exact, plain, ours)]
    for loss in losses:
        loss.backward()
    assert abs(losses[2].item() / losses[1].item() - 1) < 1e-6
    gradients = [dict(m.named_parameters()) for m in (exact, plain, ours)]
    for name, expected in gradients[0].items():
        allowed = 1.5 * error(gradients[1][name].grad, expected.grad) + 1e-7
        assert error(gradients[2][name].grad, expected.grad) <= allowed, name


def keeps_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x.float(), weight.float(), eps).to(x.dtype)


def widens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What PyTorch's norm does under CUDA's autocast from version 2.12 on."""
    return rms_norm(x.float(), weight.float(), eps)


@pytest.mark.parametrize("norm", [keeps_dtype, widens, norm_function("onelaunch")])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.filterwarnings("ignore:.*plain")
def test_autocast_with_a_norm_of_either_result(norm: Any, cached: bool) -> None:
    """Under autocast queries and keys come to their norm in bfloat16 and the residual stream in
    float32, their weights are float32, and the tables of rope are bfloat16."""
    config = SHAPES["qk-norm, head_dim independent of dim"]
    weights, tokens = random_weights(config), random_tokens(config)
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def noted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor = norm(x, weight, eps)
        dtypes.append((x.dtype, y.dtype))
        return y

    model = Model.from_weights(config, weights, norm=noted).requires_grad_(True)
    expected = Model.from_weights(config, weights)
    with torch.autocast("cpu", torch.bfloat16):
        if cached:
            cache = KVCache(config, 2, tokens.shape[1], dtype=torch.bfloat16)
            with torch.no_grad():
                pieces = [model.hidden(tokens[:, :40], cache), model.hidden(tokens[:, 40:], cache)]
            logits = F.linear(torch.cat(pieces, 1), model.head_weight()).float()
        else:
            model.loss(tokens, tokens).backward()
            logits = model(tokens)
    bf16, f32 = torch.bfloat16, torch.float32
    narrow = (bf16, f32 if norm is widens else bf16)
    layer = [(f32, f32), narrow, narrow, (f32, f32)]
    assert dtypes[:-1][: 4 * config.n_layers] == layer * config.n_layers
    assert dtypes[-1] == (f32, f32)
    assert error(logits, expected(tokens)) < 0.02
    if not cached:
        expected.requires_grad_(True).loss(tokens, tokens).backward()
        for (name, ours), theirs in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            assert ours.grad is not None
            assert ours.grad.dtype == torch.float32
            assert error(ours.grad, theirs.grad) < 0.1, name


def test_torch_compile_takes_the_operator_as_one_graph() -> None:
    config = SHAPES["qk-norm, head_dim independent of dim"]
    weights, tokens = random_weights(config), random_tokens(config)
    model = Model.from_weights(config, weights, norm=norm_function("onelaunch"))
    model.requires_grad_(True)
    model.rope(torch.device("cpu"), torch.float32, 1)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, tokens)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = model.loss(tokens, tokens)
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    for name, parameter in model.named_parameters():
        assert error(gradients[name], parameter.grad) < 1e-5, name
