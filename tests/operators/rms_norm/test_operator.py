"""The operator on a device without a kernel: its values, what it refuses, what it does to autograd,
under autocast and with activation checkpointing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onelaunch import RMSNorm, rms_norm
from onelaunch.operators.rms_norm.reference import rms_norm_backward
from tests.operators.rms_norm.suite import (
    CASTINGS,
    STRIDED,
    Case,
    assert_same,
    check,
    check_roundings,
    check_roundings_of_dw,
    eager_forward,
    gradients,
    inputs,
    run,
    semantics,
)

CPU = torch.device("cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((F32, F16), (F16, F32), (BF16, F32))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 1), (35, 96), (2, 3, 4, 7)])
@pytest.mark.parametrize(
    "meaning",
    [m for pair in PAIRS for m in semantics(*pair)],
    ids=lambda m: str(Case((1,), **m))[2:],
)
def test_every_meaning_is_as_exact_as_eager(meaning, shape):
    case = Case(shape, **meaning)
    tensors = inputs(case, CPU)
    check(case, run(case, *tensors), *tensors)


@pytest.mark.parametrize(("x_layout", "dy_layout", "shape"), STRIDED)
def test_strides_do_not_matter(x_layout, dy_layout, shape):
    case = Case(shape, x_layout=x_layout, dy_layout=dy_layout)
    tensors = inputs(case, CPU)
    check(case, run(case, *tensors), *tensors)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("weight_dtype", [None, F32, BF16, F16])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_roundings_are_those_of_the_casting(dtype, weight_dtype, casting):
    case = Case((64, 96), dtype, weight_dtype, casting)
    x, weight, dy = inputs(case, CPU)
    y = run(case, x, weight, dy).y
    if weight_dtype not in (None, dtype):  # two dtypes: castings meet in places, own bits suffice
        assert torch.equal(y, eager_forward(x, weight, case.eps, casting, 0.0))
    else:
        check_roundings(case, y, x, weight)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_closed_form_rounds_dw_as_the_casting_says(dtype, weight_dtype, casting):
    """As autograd of the plain form does, but in `none`, where it rounds nothing."""
    case = Case((64, 96), dtype, weight_dtype, casting)
    x, weight, dy = inputs(case, CPU)
    dw = rms_norm_backward(dy, x, weight, case.eps, casting)[1]
    assert dw.dtype == weight_dtype
    if dtype == F32:
        torch.testing.assert_close(dw, run(case, x, weight, dy).dw)
    else:
        check_roundings_of_dw(case, dw, x, weight, dy)


def test_it_says_once_that_there_is_no_kernel():
    program = """
import torch, warnings
from onelaunch import RMSNorm, rms_norm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 8, requires_grad=True)
    rms_norm(x).sum().backward()
    rms_norm(x.detach().bfloat16(), torch.ones(8))
    RMSNorm(8)(x)
print(len(caught), "|", caught[0].message, "|", caught[0].filename)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, message, filename = done.stdout.split(" | ")
    assert int(count) == 1
    assert "cpu" in message
    assert "plain PyTorch" in message
    assert "onelaunch" not in filename, "the warning points at the caller's line"


X = torch.randn(2, 8)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((X, W), {"casting": "hf"}, ValueError, "casting.*hf"),
        ((X, W), {"casting": None}, ValueError, "casting"),
        ((X, W), {"row_mode": "rows"}, ValueError, "row_mode.*rows"),
        ((X, W), {"row_mode": True}, ValueError, "row_mode"),
        ((X, W), {"rule": "liger"}, ValueError, "rule.*liger"),
        ((X, W[:7]), {}, ValueError, "7.*8|8.*7"),
        ((X, W[:1]), {}, ValueError, "1.*8|8.*1"),
        ((X, W.expand(2, 8)), {}, ValueError, "weight"),
        ((X, torch.tensor(1.0)), {}, ValueError, "weight"),
        ((torch.tensor(1.0), None), {}, ValueError, "x.*axis|dimension|scalar"),
        ((X.to(torch.int64), None), {}, TypeError, "x.*int64"),
        ((X.to(torch.complex64), None), {}, TypeError, "x.*complex64"),
        ((X, W.to(torch.int32)), {}, TypeError, "weight.*int32"),
        ((X, W), {"eps": -1e-6}, ValueError, "eps.*-1e-06"),
        ((X, W), {"eps": float("nan")}, ValueError, "eps.*nan"),
        ((X, W), {"eps": "1e-6"}, TypeError, "eps"),
        ((X, W), {"offset": None}, TypeError, "offset"),
        ((X, None), {"offset": 1.0}, ValueError, "offset"),
        ((X, W.to("meta")), {}, ValueError, "meta.*cpu|cpu.*meta"),
        (([1.0, 2.0], None), {}, TypeError, "x"),
        ((X, [1.0] * 8), {}, TypeError, "weight"),
        ((None, None), {}, TypeError, "x"),
    ],
)
def test_bad_input_is_refused(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        rms_norm(*arguments, **options)


def test_empty_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 0\)"):
        rms_norm(torch.empty(3, 0))


@pytest.mark.parametrize("casting", CASTINGS)
def test_autocast_leaves_the_dtype_to_the_input(casting):
    """A linear layer hands on bfloat16; the norm keeps it, and its float32 weight its gradient."""
    linear, norm = nn.Linear(8, 16), RMSNorm(16, casting=casting)
    nn.init.uniform_(norm.weight)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", BF16):
        hidden = linear(x)
        y = norm(hidden)
        from_float32 = norm(hidden.float())
    assert hidden.dtype == y.dtype == BF16
    assert from_float32.dtype == F32
    assert torch.equal(y, eager_forward(hidden, norm.weight, 1e-6, casting, 0.0))
    y.float().pow(2).sum().backward()
    assert norm.weight.grad.dtype == linear.weight.grad.dtype == F32
    assert norm.weight.grad.abs().min() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    x, weight = torch.randn(5, 8), torch.rand(8)

    def twice(x, weight):
        return rms_norm(rms_norm(x, weight) * 3, weight)

    def checkpointed(x, weight):
        return checkpoint(twice, x, weight, use_reentrant=reentrant)

    assert_same(gradients(checkpointed, x, weight), gradients(twice, x, weight))


def test_what_needs_no_gradient_gets_none():
    x, weight = torch.randn(3, 8), torch.rand(8)
    assert rms_norm(x, weight).grad_fn is None
    with torch.no_grad():
        assert rms_norm(x.requires_grad_(), weight).grad_fn is None
    with torch.inference_mode():
        assert rms_norm(x, weight).is_inference()
    rms_norm(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    frozen = x.detach()
    rms_norm(frozen, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None
    assert frozen.grad is None


@pytest.mark.parametrize("in_place", [False, True])
def test_the_input_is_never_written(in_place):
    case = Case((9, 16), in_place=in_place)
    x, weight, dy = inputs(case, CPU)
    before = x.clone(), weight.clone(), dy.clone()
    run(case, x, weight, dy)
    assert_same((x, weight), before[:2])
    if not in_place:
        assert torch.equal(dy, before[2])
