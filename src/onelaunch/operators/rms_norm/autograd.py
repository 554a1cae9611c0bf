"""RMSNorm as PyTorch knows it: a function for eager calls, an operator for everything else.

Eager calls on plain tensors go through an autograd.Function that launches the kernels: the shortest
way. torch.compile, tensor subclasses, functorch's transforms and dispatch modes go through
`torch.ops.onelaunch.rms_norm`, which has a fake form, a derivative and a rule for vmap. Both
compute the same.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.nn import Parameter

from onelaunch.operators.guards import with_recent
from onelaunch.operators.rms_norm import launch, reference
from onelaunch.operators.rms_norm.launch import Prepared, Settings
from onelaunch.operators.sequence import backward_in_c

TWICE = (
    "rms_norm: its gradient cannot be differentiated again (create_graph=True); "
    "use onelaunch.operators.rms_norm.reference.rms_norm where second derivatives are needed"
)
_PLAIN = (Tensor, Parameter)
_address = Tensor.data_ptr
# Subclasses that take operators by their own tables, which do not hold ours.
_WITHOUT_RULE = ("torch.distributed", "torch.nested")
_said: set[str] = {"meta"}  # device types of which it was said that there is no kernel


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, prepared: Prepared) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.prepared = prepared
        return prepared.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return _RMSNorm._of_saved(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def _of_saved(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None) -> Any:
        need_dw = ctx.needs_input_grad[1]
        prepared = ctx.prepared
        plain = not (
            _is_compiling()
            or _grad_enabled()
            or _dispatch_modes()
            or forward_ad._current_level >= 0
        )
        if plain and weight is not None:
            for same, needed_dw, run in prepared.recent_backward:
                if (
                    needed_dw is need_dw
                    and same(dy, x, weight)
                    and not (_address(dy) | _address(x) | _address(weight)) & 15
                ):
                    return *run(dy, x, weight), None
        # A batch of gradients (is_grads_batched) is a plain tensor without storage.
        if not plain or type(dy) is not Tensor or not _has_storage(dy) or _functorch_active():
            both = _backward_through_operator(dy, x, weight, prepared.s, need_dw)
            return both[0], both[1] if need_dw else None, None
        run = launch.backward_launch(prepared, dy, x, weight, need_dw)
        if weight is not None and not (_address(dy) | _address(x) | _address(weight)) & 15:
            recent = prepared.recent_backward
            prepared.recent_backward = with_recent(recent, (dy, x, weight), need_dw, run)
            if x.is_cuda:
                _apply_in_c()
        return *run(dy, x, weight), None


# The engine calls `apply` of a Function's node, and that of every Function looks up its backward.
_RMSNorm._backward_cls.apply = _RMSNorm.backward  # type: ignore[attr-defined]


@cache
def _apply_in_c() -> None:
    """From the first backward on a GPU on, the part of `backward` that serves known tensors is one
    in C. (Compiled autograd traces `backward` itself.)"""
    in_c = backward_in_c(_RMSNorm._of_saved)
    if in_c is not None:
        _RMSNorm._backward_cls.apply = in_c  # type: ignore[attr-defined]


# Function.apply itself first looks for functorch's transforms and for dead wrappers; apply() below
# looks for the first before, and for the others where they are in the way.
_apply = super(torch.autograd.Function, _RMSNorm).apply  # type: ignore[misc]
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_storage = torch._C._has_storage
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def apply(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """rms_norm by whichever way serves these tensors, when nothing is being compiled."""
    if forward_ad._current_level >= 0:
        return traced(x, weight, s.eps, s.casting, s.offset, s.row_mode, s.rule)
    if weight is not None and not _dispatch_modes():  # of which the guards do not see all
        for same, differentiable, known in s.recent:
            if same(x, weight) and not (_address(x) | _address(weight)) & 15:
                if differentiable and _grad_enabled():
                    return _apply(x, weight, known)
                return known.forward(x, weight)
    if (
        type(x) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and not _functorch_active()
        and not _dispatch_modes()
    ):
        try:
            prepared = launch.prepare(x, weight, s)
        except RuntimeError:
            # functorch's transforms leave wrappers behind, which have no address any more.
            alive_x, alive_weight = unwrap_dead_wrappers((x, weight))
            if alive_x is x and alive_weight is weight:
                raise
            return apply(alive_x, alive_weight, s)
        if prepared is None:
            return _plain(x, weight, s)
        differentiable = x.requires_grad or (weight is not None and weight.requires_grad)
        if weight is not None and not (_address(x) | _address(weight)) & 15:
            s.recent = with_recent(s.recent, (x, weight), differentiable, prepared)
        if differentiable and _grad_enabled():
            return _apply(x, weight, prepared)
        return prepared.forward(x, weight)
    launch.check(x, weight, s.offset)
    if type(x).__module__.startswith(_WITHOUT_RULE):
        return reference.rms_norm(x, weight, s.eps, s.casting, s.offset)
    return _through_transforms(x, weight, s)


def traced(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    casting: str,
    offset: float,
    row_mode: str,
    rule: str,
) -> Tensor:
    """The form that torch.compile sees: the operator where there is a kernel, else the plain form.

    The plain form too under functorch's transforms, which torch.compile traces through, and under
    forward-mode differentiation, for which the kernels have no rule.
    """
    launch.check(x, weight, offset)
    plain = forward_ad._current_level >= 0 or _functorch_active()
    if plain or not launch.supported(x, weight):
        return reference.rms_norm(x, weight, eps, casting, offset)
    return torch.ops.onelaunch.rms_norm(x, weight, eps, casting, offset, row_mode, rule)


def _through_operator(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    return torch.ops.onelaunch.rms_norm(x, weight, s.eps, s.casting, s.offset, s.row_mode, s.rule)


def _backward_through_operator(
    dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.onelaunch.rms_norm_backward(
        dy, x, weight, s.eps, s.casting, s.offset, need_dw, s.row_mode, s.rule
    )


def _through_transforms(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """The operator under functorch, whose grad does not go through an operator's derivative."""
    if _functorch_active() and peek_interpreter_stack().key() == TransformType.Grad:
        return _Transformed.apply(x, weight, s)
    return _through_operator(x, weight, s)


class _Transformed(torch.autograd.Function):
    """The operator for functorch: torch.func.grad, vjp, jacrev, and vmap of these."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:  # type: ignore[override]
        return _through_transforms(x, weight, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.s = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = _TransformedBackward.apply(dy, x, weight, ctx.s, need_dw)
        return dx, dw if need_dw else None, None


class _TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        dy: Tensor, x: Tensor, weight: Tensor | None, s: Settings, need_dw: bool
    ) -> tuple[Tensor, Tensor]:
        if _functorch_active() and peek_interpreter_stack().key() == TransformType.Grad:
            return _TransformedBackward.apply(dy, x, weight, s, need_dw)
        return _backward_through_operator(dy, x, weight, s, need_dw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(TWICE)


def _plain(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    if x.device.type not in _said and not launch.available(x.device):
        _said.add(x.device.type)
        warnings.warn(
            f"rms_norm: there is no kernel for {x.device.type}; the plain PyTorch form runs",
            stacklevel=4,
        )
    return reference.rms_norm(x, weight, s.eps, s.casting, s.offset)


_library = torch.library.Library("onelaunch", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, str casting, float offset, str row_mode, "
    "str rule) -> Tensor",
    tags=_tags,
)
_library.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, str casting, float offset, "
    "bool need_dw, str row_mode, str rule) -> (Tensor, Tensor)",
    tags=_tags,
)


def _forward_op(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    casting: str,
    offset: float,
    row_mode: str,
    rule: str,
) -> Tensor:
    s = launch.settings(eps, casting, offset, False, row_mode, rule)
    if launch.supported(x, weight):
        return launch.forward(x, weight, s)
    launch.check(x, weight, offset)
    return _as_promised(reference.rms_norm(x, weight, eps, casting, offset), x)


def _as_promised(result: Tensor, x: Tensor) -> Tensor:
    """A result with the strides that the fake form says."""
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    casting: str,
    offset: float,
    need_dw: bool,
    row_mode: str,
    rule: str,
) -> tuple[Tensor, Tensor]:
    launch.check_gradient(dy, x)
    s = launch.settings(eps, casting, offset, False, row_mode, rule)
    if launch.supported(x, weight):
        dx, dw = launch.backward(dy, x, weight, s, need_dw)
    else:
        launch.check(x, weight, offset)
        dx, dw = reference.rms_norm_backward(dy, x, weight, eps, casting, offset)
        dx = _as_promised(dx, x)
    return dx, dw if need_dw and dw is not None else x.new_empty(0)


def _fake_forward(
    x: Tensor, weight: Tensor | None, eps: float, casting: str, offset: float, *rest: Any
) -> Tensor:
    launch.check(x, weight, offset)
    return torch.empty_like(x)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    casting: str,
    offset: float,
    need_dw: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    if need_dw and weight is not None:
        return torch.empty_like(x), torch.empty_like(weight)
    return torch.empty_like(x), x.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _derivative(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    eps, casting, offset, row_mode, rule = ctx.rest
    need_dw = weight is not None and ctx.needs_input_grad[1]
    dx, dw = torch.ops.onelaunch.rms_norm_backward(
        dy, x, weight, eps, casting, offset, need_dw, row_mode, rule
    )
    return dx, dw if need_dw else None, None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(TWICE)


_library.impl("rms_norm", _forward_op, "CompositeExplicitAutograd")
_library.impl("rms_norm_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("onelaunch::rms_norm", _fake_forward, lib=_library)
torch.library.register_fake("onelaunch::rms_norm_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "onelaunch::rms_norm", _derivative, setup_context=_setup, lib=_library
)
torch.library.register_autograd("onelaunch::rms_norm_backward", _refuse, lib=_library)


def _vmap_forward(info: Any, in_dims: Any, x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    """A batch of x is more rows; a batch of weights is one call each."""
    x_dim, w_dim = in_dims[0], in_dims[1]
    if w_dim is None:
        return torch.ops.onelaunch.rms_norm(x.movedim(x_dim, 0), weight, *rest), 0
    assert weight is not None
    xs = [x] * info.batch_size if x_dim is None else x.unbind(x_dim)
    pairs = zip(xs, weight.unbind(w_dim), strict=True)
    return torch.stack([torch.ops.onelaunch.rms_norm(a, w, *rest) for a, w in pairs]), 0


def _vmap_backward(
    info: Any, in_dims: Any, dy: Tensor, x: Tensor, weight: Tensor | None, *rest: Any
) -> Any:
    """One call for each of the batch: every one has its own dW."""

    def unbind(tensor: Tensor | None, dim: int | None) -> Any:
        if tensor is None or dim is None:
            return [tensor] * info.batch_size
        return tensor.unbind(dim)

    parts = zip(
        *(unbind(t, d) for t, d in zip((dy, x, weight), in_dims[:3], strict=True)), strict=True
    )
    results = [torch.ops.onelaunch.rms_norm_backward(*part, *rest) for part in parts]
    dxs, dws = zip(*results, strict=True)
    return (torch.stack(dxs), torch.stack(dws)), (0, 0)


torch.library.register_vmap("onelaunch::rms_norm", _vmap_forward, lib=_library)
torch.library.register_vmap("onelaunch::rms_norm_backward", _vmap_backward, lib=_library)
