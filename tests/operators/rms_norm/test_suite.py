"""The measure itself: it passes the plain form and refuses what kernels get wrong in usual ways."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.operators.rms_norm.suite import (
    STRIDED,
    Case,
    Results,
    check,
    check_roundings,
    eager,
    inputs,
    lay_out,
)

CPU = torch.device("cpu")
CASE = Case((35, 96), dtype=torch.float16, weight_dtype=torch.float16)


def one_element_unwritten(right: Results) -> Results:
    dx = right.dx.clone()
    dx[34, 95] = float("nan")
    return replace(right, dx=dx)


def mean_over_the_padded_width(right: Results) -> Results:
    return replace(right, y=right.y * (128 / 96) ** 0.5)


def a_small_gradient_row_missing(right: Results) -> Results:
    dx = right.dx.clone()
    dx[35 // 2] = 0  # the large row of x: its dX is the smallest of all
    return replace(right, dx=dx)


def last_row_missing_in_dw(right: Results) -> Results:
    x, _, dy = inputs(CASE, CPU)
    normed = eager(replace(CASE, weight_dtype=None), x, None, dy).y
    return replace(right, dw=right.dw - (normed * dy)[-1])


def wrong_dtype(right: Results) -> Results:
    return replace(right, y=right.y.float())


def dw_of_a_frozen_weight(right: Results) -> Results:
    return replace(right, dw=None)


WRONG: list[Callable[[Results], Results]] = [
    one_element_unwritten,
    mean_over_the_padded_width,
    a_small_gradient_row_missing,
    last_row_missing_in_dw,
    wrong_dtype,
    dw_of_a_frozen_weight,
]


@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_result_is_refused(spoil):
    tensors = inputs(CASE, CPU)
    right = eager(CASE, *tensors)
    check(CASE, right, *tensors)
    with pytest.raises((AssertionError, AttributeError)):
        check(CASE, spoil(right), *tensors)


@pytest.mark.parametrize("changed", [{"eps": 1e-5}, {"offset": 1.0}], ids=str)
def test_another_meaning_is_refused(changed):
    tensors = inputs(CASE, CPU)
    with pytest.raises(AssertionError):
        check(CASE, eager(replace(CASE, **changed), *tensors), *tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("casting", "other"), [("llama", "gemma"), ("gemma", "llama")])
def test_the_roundings_of_another_casting_are_refused(casting, other, dtype):
    """Their errors are within 1.5 of each other, so only the bits tell."""
    case = Case((64, 96), dtype, dtype, casting)
    x, weight, dy = inputs(case, CPU)
    check_roundings(case, eager(case, x, weight, dy).y, x, weight)
    with pytest.raises(AssertionError):
        check_roundings(case, eager(replace(case, casting=other), x, weight, dy).y, x, weight)


@pytest.mark.parametrize(("layout", "_", "shape"), STRIDED)
def test_a_layout_changes_strides_and_nothing_else(layout, _, shape):
    values = torch.randn(shape)
    view = lay_out(values, layout)
    assert view.shape == values.shape
    assert torch.equal(view, values) or layout in ("expanded", "scalar")
    if layout == "shifted":
        assert view.data_ptr() % 16
    elif layout != "contiguous":
        assert not view.is_contiguous()
