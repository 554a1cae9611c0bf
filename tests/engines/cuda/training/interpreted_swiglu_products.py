"""The matrix products with SwiGLU in their epilogues through Triton's interpreter, on CPU tensors:
float16, and float32 to see what is computed without rounding. Each against PyTorch in float64; what
a kernel is to write begins as NaN. Run by test_interpreter.py in processes of its own."""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as functional  # noqa: E402
from torch import Tensor  # noqa: E402

from onelaunch.engines.cuda.training import forms, launches, swiglu_launches  # noqa: E402
from onelaunch.engines.cuda.training.forms import ProductTile  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()

DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.2e-3}  # of the largest value of a tensor
SHAPES = ((1, 64, 176), (70, 48, 176), (129, 288, 80), (64, 64, 128), (33, 96, 8))
FORWARD = (
    ProductTile(64, 64, 64, 3, 4, 0, tma_stores=True),
    ProductTile(32, 64, 32, 3, 4, 1, parts=2, flatten=True, tma_stores=True),
    ProductTile(64, 32, 64, 3, 4, 0, parts=1),
    ProductTile(32, 64, 64, 3, 4, 1, parts=2, flatten=True),
    ProductTile(32, 64, 32, 3, 4, 0, parts=4),
)
BACKWARD = (
    ProductTile(64, 64, 64, 3, 4, 0, ahead=2),
    ProductTile(32, 64, 32, 3, 4, 1, parts=2, flatten=True, ahead=1),
    ProductTile(32, 64, 64, 3, 4, 0, parts=4, ahead=0),
    ProductTile(32, 128, 32, 3, 4, 1, parts=4, ahead=2),
)


@pytest.fixture(autouse=True)
def _few_ctas(monkeypatch):
    """So that persistent CTAs take several tiles each."""
    monkeypatch.setattr(forms, "MULTIPROCESSORS", 3)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def guarded(N: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """N rows of NaN, and the row after them, which a kernel must leave as it is."""
    storage = poisoned(N + 1, columns, dtype=dtype)
    storage[N] = 7
    return storage[:N], storage[N]


def assert_close(got: Tensor, exact: Tensor) -> None:
    error = (got.double() - exact).abs().max()
    assert error <= TOLERANCE[got.dtype] * exact.abs().max(), f"{error:.2e}"  # no NaN is below


def swiglu_of(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", FORWARD)
def test_gate_up_swiglu(shape, tile, dtype):
    """hidden is the SwiGLU of gate_up as it is stored, with the bits of the kernel without a
    product."""
    N, D, F = shape
    x, weight = normal(N, D, dtype=dtype), normal(2 * F, D, dtype=dtype, seed=1) / D**0.5
    gate_up, after_gate_up = guarded(N, 2 * F, dtype)
    hidden, after_hidden = guarded(N, F, dtype)
    swiglu_launches.gate_up_swiglu(x, weight, gate_up, hidden, tile)
    assert_close(gate_up, x.double() @ weight.double().t())
    unfused = poisoned(N, F, dtype=dtype)
    launches.swiglu(gate_up, unfused)
    assert torch.equal(hidden, unfused)
    assert (after_gate_up == 7).all()
    assert (after_hidden == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", BACKWARD)
@pytest.mark.parametrize("in_place", [False, True])
def test_down_back_swiglu(shape, tile, in_place, dtype):
    N, D, F = shape
    dx, weight = normal(N, D, dtype=dtype), normal(D, F, dtype=dtype, seed=1) / D**0.5
    gate_up, after = guarded(N, 2 * F, dtype)
    gate_up[:] = normal(N, 2 * F, dtype=dtype, seed=2)
    gate_up64 = gate_up.double().requires_grad_()
    expected = swiglu_of(gate_up64)
    expected.backward(dx.double() @ weight.double())
    to = gate_up if in_place else poisoned(N, 2 * F, dtype=dtype)
    hidden = poisoned(N, F, dtype=dtype) if in_place else None
    swiglu_launches.down_back_swiglu(dx, weight, gate_up, to, hidden, tile)
    assert_close(to, gate_up64.grad)
    assert hidden is None or assert_close(hidden, expected.detach()) is None
    assert (after == 7).all()


def test_the_backward_has_the_bits_of_the_kernel_without_a_product():
    """With an identity as the weight, both read the same dhidden."""
    N, F = 70, 64
    dx, weight = normal(N, F, dtype=torch.float16), torch.eye(F, dtype=torch.float16)
    gate_up = normal(N, 2 * F, dtype=torch.float16, seed=2)
    unfused, hidden = poisoned(N, 2 * F, dtype=dx.dtype), poisoned(N, F, dtype=dx.dtype)
    launches.swiglu_backward(dx, gate_up, unfused, hidden)
    for tile in BACKWARD:
        to, again = poisoned(N, 2 * F, dtype=dx.dtype), poisoned(N, F, dtype=dx.dtype)
        swiglu_launches.down_back_swiglu(dx, weight, gate_up, to, again, tile)
        assert torch.equal(to, unfused)
        assert torch.equal(again, hidden)


@pytest.mark.parametrize(("ctas_per_sm", "count"), [(0, 12), (1, 3), (2, 6), (5, 12)])
def test_the_grid_has_no_more_ctas_than_tiles(ctas_per_sm, count):
    assert ProductTile(64, 64, 64, 3, 4, ctas_per_sm).grid(129, 200) == (count,)
