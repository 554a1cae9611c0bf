"""RMSNorm in autograd: an autograd.Function for eager calls, a custom operator for the rest.

Eager calls on plain tensors use an autograd.Function that launches the kernels, with the least host
work. torch.compile, tensor subclasses, functorch transforms and dispatch modes use
`torch.ops.onelaunch.rms_norm`, which has a fake kernel, a derivative and a vmap rule. Both compute
the same result.
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

from onelaunch.operators.guards import add_recent
from onelaunch.operators.rms_norm import launch, reference
from onelaunch.operators.rms_norm.launch import Prepared, Settings
from onelaunch.operators.sequence import backward_in_c

DOUBLE_BACKWARD_ERROR = (
    "rms_norm: second derivatives (create_graph=True) are not supported; "
    "use onelaunch.operators.rms_norm.reference.rms_norm for them"
)
_PLAIN = (Tensor, Parameter)
_address = Tensor.data_ptr
# Tensor subclasses whose operator tables do not include ours.
_UNSUPPORTED_SUBCLASSES = ("torch.distributed", "torch.nested")
_warned: set[str] = {"meta"}  # device types without a kernel that a warning has named


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, prepared: Prepared) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.prepared = prepared
        return prepared.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return _RMSNorm._backward_of_saved(ctx, dy, *ctx.saved_tensors)

    @staticmethod
    def _backward_of_saved(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None) -> Any:
        need_dw = ctx.needs_input_grad[1]
        prepared = ctx.prepared
        plain = not (
            _is_compiling()
            or _grad_enabled()
            or _dispatch_modes()
            or forward_ad._current_level >= 0
        )
        if plain and weight is not None:
            for guard, needed_dw, run in prepared.recent_backward:
                if (
                    needed_dw is need_dw
                    and guard(dy, x, weight)
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
            prepared.recent_backward = add_recent(recent, (dy, x, weight), need_dw, run)
            if x.is_cuda:
                _apply_in_c()
        return *run(dy, x, weight), None


# Autograd calls `apply` of the node; the default one looks up `backward` at each call.
_RMSNorm._backward_cls.apply = _RMSNorm.backward  # type: ignore[attr-defined]


@cache
def _apply_in_c() -> None:
    """Let the C extension look up `recent_backward`, from the first backward on a GPU on. (Compiled
    autograd still traces `backward`.)"""
    in_c = backward_in_c(_RMSNorm._backward_of_saved)
    if in_c is not None:
        _RMSNorm._backward_cls.apply = in_c  # type: ignore[attr-defined]


# Function.apply first checks for functorch transforms and unwraps dead wrappers; `apply` below has
# checked for transforms already, and unwraps only if a launch fails.
_apply = super(torch.autograd.Function, _RMSNorm).apply  # type: ignore[misc]
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_storage = torch._C._has_storage
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def apply(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    """Compute rms_norm outside of torch.compile, by the fastest path for these tensors."""
    if forward_ad._current_level >= 0:
        return traced(x, weight, s.eps, s.casting, s.offset, s.row_mode, s.rule)
    if weight is not None and not _dispatch_modes():  # the guards do not see all modes
        for guard, differentiable, cached in s.recent:
            if guard(x, weight) and not (_address(x) | _address(weight)) & 15:
                if differentiable and _grad_enabled():
                    return _apply(x, weight, cached)
                return cached.forward(x, weight)
    if (
        type(x) in _PLAIN
        and (weight is None or type(weight) in _PLAIN)
        and not _functorch_active()
        and not _dispatch_modes()
    ):
        try:
            prepared = launch.prepare(x, weight, s)
        except RuntimeError:
            # functorch transforms leave dead wrappers behind, without storage.
            alive_x, alive_weight = unwrap_dead_wrappers((x, weight))
            if alive_x is x and alive_weight is weight:
                raise
            return apply(alive_x, alive_weight, s)
        if prepared is None:
            return _plain(x, weight, s)
        differentiable = x.requires_grad or (weight is not None and weight.requires_grad)
        if weight is not None and not (_address(x) | _address(weight)) & 15:
            s.recent = add_recent(s.recent, (x, weight), differentiable, prepared)
        if differentiable and _grad_enabled():
            return _apply(x, weight, prepared)
        return prepared.forward(x, weight)
    launch.check(x, weight, s.offset)
    if type(x).__module__.startswith(_UNSUPPORTED_SUBCLASSES):
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
    """Compute rms_norm under torch.compile: by the operator if there is a kernel, else plain.

    The plain form also serves functorch transforms, which torch.compile traces through, and
    forward-mode differentiation, which the kernels do not support.
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
    """Call the operator under functorch, whose grad ignores the derivative of an operator."""
    if _functorch_active() and peek_interpreter_stack().key() == TransformType.Grad:
        return _Transformed.apply(x, weight, s)
    return _through_operator(x, weight, s)


class _Transformed(torch.autograd.Function):
    """The operator with a derivative for torch.func.grad, vjp, jacrev, and vmap of these."""

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
        raise RuntimeError(DOUBLE_BACKWARD_ERROR)


def _plain(x: Tensor, weight: Tensor | None, s: Settings) -> Tensor:
    if x.device.type not in _warned and not launch.available(x.device):
        _warned.add(x.device.type)
        warnings.warn(
            f"rms_norm: no kernel for {x.device.type}; the plain PyTorch form runs",
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
    return _with_fake_strides(reference.rms_norm(x, weight, eps, casting, offset), x)


def _with_fake_strides(result: Tensor, x: Tensor) -> Tensor:
    """Return the result with the strides of the fake kernel's result."""
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


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
        dx = _with_fake_strides(dx, x)
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


def _refuse_double_backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(DOUBLE_BACKWARD_ERROR)


_library.impl("rms_norm", _forward_op, "CompositeExplicitAutograd")
_library.impl("rms_norm_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("onelaunch::rms_norm", _fake_forward, lib=_library)
torch.library.register_fake("onelaunch::rms_norm_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "onelaunch::rms_norm", _derivative, setup_context=_setup, lib=_library
)
torch.library.register_autograd(
    "onelaunch::rms_norm_backward", _refuse_double_backward, lib=_library
)


def _vmap_forward(info: Any, in_dims: Any, x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    """A batch of x is more rows; a batch of weights is one call per weight."""
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
    """One call per element of the batch, as each has its own dW."""

    def unbind(tensor: Tensor | None, dim: int | None) -> Any:
        if tensor is None or dim is None:
            return [tensor] * info.batch_size
        return tensor.unbind(dim)

    arguments = zip(
        *(unbind(t, d) for t, d in zip((dy, x, weight), in_dims[:3], strict=True)), strict=True
    )
    results = [torch.ops.onelaunch.rms_norm_backward(*each, *rest) for each in arguments]
    dxs, dws = zip(*results, strict=True)
    return (torch.stack(dxs), torch.stack(dws)), (0, 0)


torch.library.register_vmap("onelaunch::rms_norm", _vmap_forward, lib=_library)
torch.library.register_vmap("onelaunch::rms_norm_backward", _vmap_backward, lib=_library)
