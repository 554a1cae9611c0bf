"""The module: in the place of torch's, and equal to the models its castings are named after."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from onelaunch import RMSNorm, rms_norm
from onelaunch.operators.rms_norm.reference import rms_norm_backward
from tests.operators.rms_norm.suite import Case, Results, check, gradients, inputs, run

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


def test_the_module_is_what_torchs_is():
    ours, torchs = RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)
    assert ours.state_dict().keys() == torchs.state_dict().keys() == {"weight"}
    assert ours.weight.dtype == F32
    nn.init.uniform_(torchs.weight)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(4, 8)
    for got, want in zip(gradients(ours, x), gradients(torchs, x), strict=True):
        torch.testing.assert_close(got, want)
    assert RMSNorm((8,)).weight.shape == (8,)
    assert not list(RMSNorm(8, elementwise_affine=False).parameters())
    assert RMSNorm(8, elementwise_affine=False).state_dict() == {}
    made = RMSNorm(8, device="meta", dtype=BF16).weight
    assert (made.device.type, made.dtype) == ("meta", BF16)


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.25])
def test_a_new_module_multiplies_by_one(offset):
    norm = RMSNorm(8, offset=offset, casting="gemma")
    assert torch.equal(norm.weight, torch.full((8,), 1 - offset))
    x = torch.randn(4, 8)
    torch.testing.assert_close(norm(x), rms_norm(x))
    nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.full((8,), 1 - offset))


def test_the_module_keeps_every_option():
    options = {"casting": "gemma", "offset": 1.0, "in_place": True}
    options |= {"row_mode": "block", "rule": "source"}
    kept = RMSNorm(8, 1e-3, **options).settings
    assert {name: getattr(kept, name) for name in ("eps", *options)} == {"eps": 1e-3} | options
    plain = RMSNorm(8).settings
    assert (plain.eps, plain.casting, plain.offset) == (1e-6, "llama", 0.0)
    assert (plain.in_place, plain.row_mode, plain.rule) == (False, "auto", "tuned")


def test_the_module_heeds_its_options():
    case = Case((5, 8), casting="gemma", offset=0.5, eps=0.1)
    x, weight, dy = inputs(case, CPU)
    norm = RMSNorm(8, 0.1, casting="gemma", offset=0.5)
    norm.weight = nn.Parameter(weight)
    y = norm(x.requires_grad_())
    dx, dw = torch.autograd.grad(y, (x, norm.weight), dy)
    check(case, Results(y.detach(), dx, dw), x.detach(), weight, dy)


def test_the_module_says_what_it_is():
    assert repr(RMSNorm(8)).startswith("RMSNorm(")
    text = repr(RMSNorm(8, 1e-5, casting="gemma", offset=1.0))
    for part in ("8", "eps=1e-05", "gemma", "offset=1.0"):
        assert part in text, text
    assert "elementwise_affine=False" in repr(RMSNorm(8, elementwise_affine=False))


def test_a_copy_has_its_own_weight():
    norm = RMSNorm(8, casting="gemma", offset=1.0)
    twin = copy.deepcopy(norm)
    nn.init.uniform_(twin.weight)
    assert not torch.equal(norm.weight, twin.weight)
    assert repr(norm) == repr(twin)
    assert pickle.loads(pickle.dumps(norm)).settings == norm.settings


# the Hugging Face models that two castings are named after
HUGGING_FACE = [
    ("llama", 0.0, "transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    ("gemma", 1.0, "transformers.models.gemma.modeling_gemma", "GemmaRMSNorm"),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("casting", "offset", "module", "name"), HUGGING_FACE)
def test_it_equals_the_model_its_casting_is_named_after(casting, offset, module, name, dtype):
    theirs = getattr(pytest.importorskip(module), name)(64, eps=1e-6).to(dtype)
    nn.init.normal_(theirs.weight, 1 - offset, 0.3)
    case = Case((128, 64), dtype, dtype, casting, offset)
    x, _, dy = inputs(case, CPU)
    want = theirs(x)
    ours = RMSNorm(64, 1e-6, dtype=dtype, casting=casting, offset=offset)
    ours.load_state_dict(theirs.state_dict())
    y = ours(x)
    assert y.dtype == want.dtype
    assert float((y == want).float().mean()) >= 0.999
    for got, right in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5 if dtype == F32 else 2e-2, atol=1e-5)
    theirs.zero_grad()
    theirs(x).backward(dy)
    dw = rms_norm_backward(dy, x, ours.weight.detach(), 1e-6, casting, offset)[1]
    torch.testing.assert_close(dw, theirs.weight.grad)
    if dtype == BF16:  # but for a sum in another order, at both sides of a rounding boundary
        assert float((dw == theirs.weight.grad).float().mean()) >= 0.95
    if dtype == BF16:
        other = "llama" if casting == "gemma" else "gemma"
        another = run(replace(case, casting=other), x, ours.weight, dy).y
        assert float((another == want).float().mean()) < 0.9


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((2, 8),), {}, "last axis"),
        ((8,), {"casting": "hf"}, "casting"),
        ((8,), {"row_mode": "rows"}, "row_mode"),
        ((8,), {"rule": "liger"}, "rule"),
        ((8,), {"elementwise_affine": False, "offset": 1.0}, "offset"),
    ],
)
def test_a_bad_module_is_refused_when_made(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        RMSNorm(*arguments, **options)
