from __future__ import annotations

import pytest
import torch

from onelaunch.operators.empty import Empty
from onelaunch.operators.handles import Bound, Handle
from onelaunch.operators.sequence import python_twin

HANDLE = Handle(11, 7, 64, 1024, False, (None, None, None, 5, 0, 0), 0)


def test_the_python_twin():
    calls = []
    steps = [
        (Bound(lambda *tensors: calls.append(tensors)), (0, 2, 4)),
        (lambda *tensors: calls.append(tensors), (4, 3)),
    ]
    cpu = torch.device("cpu")
    empty = [
        Empty((2, 3), (3, 1), torch.float32, cpu),
        Empty((3,), (1,), torch.bfloat16, cpu),
        Empty((4, 3), (3, 1), torch.float32, cpu),
    ]
    x, w = torch.randn(2, 3), torch.randn(3)
    dx, dw = python_twin(2, empty, steps, (2, 3))(x, w)
    assert [len(tensors) for tensors in calls] == [3, 2]
    assert calls[0][0] is x
    assert calls[0][1] is dx
    assert calls[0][2] is calls[1][0]
    assert calls[1][1] is dw
    assert python_twin(2, empty, steps, (0,))(x, w) is x


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(4, 6),
        torch.empty(6, 4).t(),
        torch.empty(4, 12)[:, :6],
        torch.empty(2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 1),
        torch.empty(1, 6).expand(4, 6),
        torch.empty(0, 6),
    ],
)
def test_an_empty_tensor_lies_as_empty_like_makes_it(like):
    result, expected = Empty.like(like)(), torch.empty_like(like)
    assert (result.shape, result.dtype, result.device) == (like.shape, like.dtype, like.device)
    assert result.stride() == expected.stride()
    assert result.data_ptr() != like.data_ptr() or like.numel() == 0


def test_a_launch_names_every_tensor_once():
    assert HANDLE.as_tuple((3, 0, 1))[-1][:4] == ((3, 0), (0, 0), (1, 0), (-1, 5))
    for wrong in ((3, 0), (3, 0, 1, 2)):
        with pytest.raises(AssertionError):
            HANDLE.as_tuple(wrong)
