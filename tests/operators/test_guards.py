from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onelaunch.operators import guards
from onelaunch.operators.guards import add_recent, make_guard


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def pair():
    return torch.randn(4, 6), torch.randn(6)


def test_a_guard_accepts_tensors_like_its_own():
    x, w = pair()
    guard = make_guard(x, w)
    assert guard(x, w)
    assert guard(*pair())
    assert guard(torch.zeros(5, 6)[1:], w)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:3],
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.empty(4, 7)[:, :6],
        lambda x: x[None],
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: torch._neg_view(x),
        lambda x: x.to("meta"),
    ],
)
def test_a_guard_rejects_all_others(change):
    x, w = pair()
    guard = make_guard(x, w)
    other = change(x)
    assert not guard(other, w)
    assert make_guard(other, w)(other, w)


def test_modes_and_transforms_are_seen():
    x, w = pair()
    guard = make_guard(x, w)
    with Mode():
        assert not guard(x, w)
    with torch.inference_mode():
        assert not guard(x, w)
    with torch.autocast("cpu"):
        assert not guard(x, w)

    def transformed(x):
        assert not guard(x, w)
        return x.sum()

    for transform in (torch.func.vmap, torch.func.grad):
        transform(transformed)(x)
    assert guard(x, w)


def test_a_guard_keeps_no_tensor():
    x, w = pair()
    reference = weakref.ref(x)
    guard = make_guard(x, w)
    del x
    gc.collect()
    assert reference() is None
    assert guard(*pair())


def test_without_pytorchs_guards_nothing_is_cached(monkeypatch):
    monkeypatch.setattr(guards, "TensorGuards", None)
    assert make_guard(*pair()) is None
    assert add_recent((), pair(), True, "value") == ()


def test_the_latest_are_kept():
    recent = ()
    for n in range(1, 2 * guards.MAX_RECENT):
        recent = add_recent(recent, (torch.empty(n),), n, str(n))
    assert [value for _, _, value in recent] == ["7", "6", "5", "4"]
    assert [guard(torch.empty(5)) for guard, _, _ in recent] == [False, False, True, False]
