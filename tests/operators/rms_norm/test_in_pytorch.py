"""The operator inside PyTorch's machinery, on a device without a kernel: the registered operators,
fake tensors, the compiler, functorch, subclasses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from onelaunch import RMSNorm, rms_norm
from tests.operators.rms_norm.suite import (
    CASTINGS,
    STRIDED,
    Case,
    check_promises,
    eager_forward,
    gradients,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def arguments(dtype, weight_dtype, casting, offset=0.0, rows=5, requires_grad=True):
    x = torch.randn(rows, 12).to(dtype).requires_grad_(requires_grad)
    weight = None
    if weight_dtype is not None:
        weight = torch.rand(12).to(weight_dtype).requires_grad_(requires_grad)
    return x, weight, 1e-6, casting, offset, "auto", "tuned"


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F16, None)])
def test_the_forward_operator_passes_opcheck(dtype, weight_dtype, casting, rows):
    inputs = arguments(dtype, weight_dtype, casting, rows=rows)
    torch.library.opcheck(torch.ops.onelaunch.rms_norm.default, inputs)


@pytest.mark.parametrize("need_dw", [True, False])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F16, None)])
def test_the_backward_operator_passes_opcheck(dtype, weight_dtype, need_dw):
    x, weight, *rest = arguments(dtype, weight_dtype, "llama", requires_grad=False)
    eps, casting, offset, row_mode, rule = rest
    inputs = (torch.randn_like(x), x, weight, eps, casting, offset)
    inputs += (need_dw and weight is not None, row_mode, rule)
    torch.library.opcheck(torch.ops.onelaunch.rms_norm_backward.default, inputs)


@pytest.mark.parametrize(("x_layout", "dy_layout", "shape"), STRIDED)
def test_strides_of_results_are_those_promised(x_layout, dy_layout, shape):
    check_promises(Case(shape, x_layout=x_layout, dy_layout=dy_layout), torch.device("cpu"))


@pytest.mark.parametrize("casting", CASTINGS)
def test_the_registered_operator_equals_the_function(casting):
    x, weight, *rest = arguments(F32, F32, casting, 0.5, requires_grad=False)

    def registered(x, weight):
        return torch.ops.onelaunch.rms_norm(x, weight, *rest)

    def function(x, weight):
        return rms_norm(x, weight, casting=casting, offset=0.5)

    for got, want in zip(
        gradients(registered, x, weight), gradients(function, x, weight), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_fake_tensors_have_the_right_shape_and_dtype():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=BF16, requires_grad=True)
        weight = torch.empty(8, requires_grad=True)
        y = rms_norm(x, weight)
        assert y.shape == (2, 3, 8)
        assert y.dtype == BF16
        dx, dw = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
        assert (dx.shape, dx.dtype) == (x.shape, BF16)
        assert (dw.shape, dw.dtype) == (weight.shape, F32)
        registered = torch.ops.onelaunch.rms_norm(x, weight, 1e-6, "llama", 0.0, "auto", "tuned")
        assert (registered.shape, registered.dtype) == (x.shape, BF16)


def test_meta_tensors_have_the_right_shape_and_dtype():
    y = rms_norm(torch.empty(2, 8, dtype=BF16, device="meta"), torch.empty(8, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 8), BF16, "meta")


def test_make_fx_traces_it_with_its_gradients():
    """In float64: the traced backward is the closed form, the eager one autograd's, and where terms
    cancel the two are apart by several float32 roundings."""

    def step(x, weight):
        y = rms_norm(x, weight, casting="gemma", offset=1.0)
        return (y, *torch.autograd.grad(y.square().sum(), (x, weight)))

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight = randn(5, 8), randn(8)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(step, tracing_mode=mode)(x, weight)
        other = randn(5, 8)
        for got, want in zip(graph(other, weight), step(other, weight), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled_whole_equals_eager(casting, dtype, affine):
    torch.compiler.reset()

    def layer(x, *weight):
        return rms_norm(x * 2, *weight, casting=casting).float() + 1

    tensors = [torch.randn(6, 16).to(dtype)] + [torch.randn(16).to(dtype)] * affine
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, want in zip(gradients(compiled, *tensors), gradients(layer, *tensors), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)


def test_one_compilation_serves_every_number_of_rows():
    torch.compiler.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = torch.randn(16)
    with torch.compiler.set_stance("default"):
        torch.testing.assert_close(compiled(X16(3), weight), rms_norm(X16(3), weight))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (4, 7, 100):
            torch.testing.assert_close(compiled(X16(rows), weight), rms_norm(X16(rows), weight))


def X16(rows):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))


def test_a_compiled_module_trains_as_the_module_does():
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), RMSNorm(16, casting="gemma", offset=1.0))
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    for model in (plain, compiled):
        model(x).pow(3).sum().backward()
    for a, b in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_error_shows_through_the_compiler():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: rms_norm(x, casting="hf"), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="casting"):
        compiled(torch.randn(2, 8))


def forward_jvp(function, primals, tangents):
    with forward_ad.dual_level():
        y = function(*map(forward_ad.make_dual, primals, tangents))
        return forward_ad.unpack_dual(y)


def test_functorch_gradients_equal_autograd():
    x, weight = torch.randn(5, 8), torch.rand(8)

    def loss(x, weight):
        return rms_norm(x, weight).pow(3).sum()

    got = torch.func.grad(loss, argnums=(0, 1))(x, weight)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    want = torch.autograd.grad(loss(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_functorch_vmap_equals_a_loop():
    x, weights = torch.randn(3, 5, 8), torch.rand(3, 8)
    want = torch.stack([rms_norm(a, w) for a, w in zip(x, weights, strict=True)])
    torch.testing.assert_close(torch.func.vmap(rms_norm)(x, weights), want)
    shared = torch.func.vmap(rms_norm, in_dims=(0, None))(x, weights[0])
    torch.testing.assert_close(shared, torch.stack([rms_norm(a, weights[0]) for a in x]))


def test_functorch_gradients_of_each_sample():
    x, weight = torch.randn(4, 5, 8), torch.rand(8)

    def loss(weight, x):
        return rms_norm(x, weight).pow(3).sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    want = torch.stack([torch.func.grad(loss)(weight, a) for a in x])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", [torch.func.jvp, forward_jvp])
def test_forward_mode_is_refused_or_right(transform):
    """Never a result whose tangent was lost."""
    x, tangent, weight = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    want = transform(lambda x: eager_forward(x, weight, 1e-6, "llama", 0.0), (x,), (tangent,))
    try:
        got = transform(lambda x: rms_norm(x, weight), (x,), (tangent,))
    except (NotImplementedError, RuntimeError):
        return
    assert got[1] is not None, "the tangent was lost in silence"
    torch.testing.assert_close(got[1], want[1])


class Named(torch.Tensor):
    """A tensor subclass of the plainest kind."""


class Wrapped(torch.Tensor):
    """A tensor that holds another and notes which operators reached it."""

    seen: list[str]

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        def inner(a):
            return a.inner if isinstance(a, Wrapped) else a

        result = operator(*map(inner, args), **{k: inner(v) for k, v in (kwargs or {}).items()})
        if isinstance(result, torch.Tensor):
            return cls(result)
        return type(result)(cls(r) if isinstance(r, torch.Tensor) else r for r in result)


def test_a_subclass_stays_what_it_is():
    x, weight = torch.randn(4, 8).as_subclass(Named), torch.rand(8)
    y = rms_norm(x, weight)
    assert isinstance(y, Named)
    torch.testing.assert_close(
        y.as_subclass(torch.Tensor), rms_norm(x.as_subclass(torch.Tensor), weight)
    )


def test_a_wrapper_subclass_is_served_with_its_gradients():
    x, weight = torch.randn(4, 8), torch.rand(8)
    want = gradients(rms_norm, x, weight)
    leaves = Wrapped(x).requires_grad_(), Wrapped(weight).requires_grad_()
    y = rms_norm(*leaves)
    assert isinstance(y, Wrapped)
    torch.testing.assert_close(y.detach().inner, want[0])
    weights = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad((y * Wrapped(weights)).sum(), leaves)
    for g, w in zip(got, want[1:], strict=True):
        torch.testing.assert_close(g.inner, w)
