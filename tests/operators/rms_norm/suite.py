"""What RMSNorm must equal, wherever it runs: random inputs, the float64 oracle, the same-dtype
eager forms, and how far a result may lie from the oracle.

N rows, C columns. The error of a result is relative and every row counts the same, however its
scale differs from its neighbours'. It may be 1.5 times the error of the eager form in the same
dtype, which is plain PyTorch under autograd: the formulas of the Hugging Face models, written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from onelaunch import rms_norm
from onelaunch.operators.devices import multiprocessors
from onelaunch.operators.rms_norm.plan import Plan, backward_plan, forward_plan

CASTINGS = ("llama", "gemma", "none")

# The reciprocal root of a GPU is exact to 2 units in the last place of float32, the eager one to
# half a unit; a sum in another order adds about as much. Where the eager error is nearly nothing
# by luck (one column, one row), 1.5 times it would ask for that luck.
FLOOR_FLOAT32 = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of `rms_norm` and its backward: the last axis of `shape` is C."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = torch.float32  # None: no weight
    casting: str = "llama"
    offset: float = 0.0
    eps: float = 1e-6
    in_place: bool = False
    row_mode: str = "auto"
    rule: str = "tuned"
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), _short(self.dtype), self.casting]
        words.append("no-weight" if self.weight_dtype is None else f"w-{_short(self.weight_dtype)}")
        words += [f"offset{self.offset:g}"] * bool(self.offset)
        words += ["in-place"] * self.in_place
        words += [self.row_mode] * (self.row_mode != "auto")
        words += [self.rule] * (self.rule != "tuned")
        words += [f"x-{self.x_layout}"] * (self.x_layout != "contiguous")
        words += [f"dy-{self.dy_layout}"] * (self.dy_layout != "contiguous")
        return "-".join(words)

    def plans(self, device: torch.device) -> tuple[Plan, Plan]:
        """The forward and the backward plan of this case on a device."""
        size = torch.empty((), dtype=self.dtype).element_size()
        facts = (self.rows, self.columns, size, multiprocessors(device), self.row_mode, self.rule)
        return forward_plan(*facts), backward_plan(*facts)


@dataclass(frozen=True)
class Results:
    y: Tensor
    dx: Tensor
    dw: Tensor | None


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# ------------------------------------------------------------------------------------------ inputs


def inputs(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """Random x, weight and dY: rows of mixed scale, among them a large one and a row of zeros.

    The large row's squares pass what float16 holds, so a sum of squares in the input's dtype shows.
    """
    generator = torch.Generator(device).manual_seed(seed + case.rows * 31 + case.columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    rows, columns = case.rows, case.columns
    scale_N1 = 10 ** (2 * uniform(rows, 1) - 1)
    if rows > 4:
        scale_N1[rows // 2] = 500.0
        scale_N1[rows // 3] = 0.0
    x_NC = normal(rows, columns) * scale_N1
    dy_NC = normal(rows, columns) * 10 ** (uniform(rows, 1) - 0.5)
    weight = None
    if case.weight_dtype is not None:
        weight = (1 - case.offset + 0.3 * normal(columns)).to(case.weight_dtype)
    x = lay_out(x_NC.to(case.dtype).view(case.shape), case.x_layout)
    dy = lay_out(dy_NC.to(case.dtype).view(case.shape), case.dy_layout)
    return x, weight, dy


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values at other strides; NaN lies between them, so that reading it shows.

    `expanded` and `scalar` hold fewer values: one row for all, one number for all.
    """
    shape = values.shape

    def around(*sizes: int) -> Tensor:
        return values.new_full(sizes, float("nan"))

    if layout == "contiguous":
        return values.contiguous()
    if layout == "padded rows":
        view = around(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
    elif layout == "shifted":  # the first element is not aligned to 16 bytes
        view = around(values.numel() + 1)[1:].view(shape)
    elif layout == "q of packed qkv":  # (B, S, 3, H, E), of which q is (B, S, H, E)
        b, s, h, e = shape
        view = around(b, s, 3, h, e)[:, :, 0]
    elif layout == "heads first":  # (B, H, S, E), stored as (B, S, H, E)
        b, h, s, e = shape
        view = around(b, s, h, e).transpose(1, 2)
    elif layout == "every other column":
        view = around(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "columns first":
        view = around(shape[-1], *shape[:-1]).movedim(0, -1)
    elif layout == "expanded":
        return values.reshape(-1, shape[-1])[-1].clone().expand(shape)
    elif layout == "scalar":
        return values.reshape(-1)[0].clone().expand(shape)
    else:
        raise ValueError(f"no layout {layout!r}")
    return view.copy_(values)


# ----------------------------------------------------------------------------------------- results


def run(case: Case, x: Tensor, weight: Tensor | None, dy: Tensor) -> Results:
    """The operator's results through autograd."""
    x = x.detach().requires_grad_()
    weight = None if weight is None else weight.detach().requires_grad_()
    y = rms_norm(
        x,
        weight,
        case.eps,
        casting=case.casting,
        offset=case.offset,
        in_place=case.in_place,
        row_mode=case.row_mode,
        rule=case.rule,
    )
    return _with_gradients(y, x, weight, dy)


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The result of function(*tensors) and the gradients of a random sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    (y * weights).sum().backward()  # not autograd.grad: a reentrant checkpoint refuses that
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def eager_forward(
    x: Tensor, weight: Tensor | None, eps: float, casting: str, offset: float
) -> Tensor:
    """As `LlamaRMSNorm`, `GemmaRMSNorm` and a plain one compute it, in the input's own dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if casting == "llama":
        scale = weight + offset if offset else weight
        return (scale * normed.to(x.dtype)).to(x.dtype)
    if casting == "gemma":
        return (normed * (offset + weight.float())).type_as(x)
    return normed.to(x.dtype) * (weight.to(x.dtype) + offset)


def eager(case: Case, x: Tensor, weight: Tensor | None, dy: Tensor) -> Results:
    """The eager form and what autograd makes of it."""
    x = x.detach().requires_grad_()
    weight = None if weight is None else weight.detach().requires_grad_()
    y = eager_forward(x, weight, case.eps, case.casting, case.offset)
    return _with_gradients(y, x, weight, dy)


def _with_gradients(y: Tensor, x: Tensor, weight: Tensor | None, dy: Tensor) -> Results:
    wanted = [x] if weight is None else [x, weight]
    gradients = torch.autograd.grad(y, wanted, dy)
    return Results(y.detach(), gradients[0], gradients[1] if weight is not None else None)


def exact(case: Case, x: Tensor, weight: Tensor | None, dy: Tensor) -> tuple[Results, dict]:
    """The closed form in float64, and the sizes against which errors are held, by name; a result
    that is not named is held against its own.

    With r = 1 / sqrt(mean(x^2) + eps) and m = dY * (weight + offset):
    y = x r (weight + offset), dX = r (m - x r mean(m x r)), dW = sum over rows of dY x r.
    Where the two terms of dX nearly cancel (one column) its own size is no measure: each row's is
    that of the terms. So it is with dW where few columns are summed: its size is at least that of
    the sum's terms.
    """
    x, dy = x.double(), dy.double()
    scale = torch.ones_like(x[..., :1]) if weight is None else weight.double() + case.offset
    r = (x.pow(2).mean(-1, keepdim=True) + case.eps).rsqrt()
    normed, m = x * r, dy * scale
    dx = r * (m - normed * (m * normed).mean(-1, keepdim=True))
    terms = dy * normed
    dw = None if weight is None else terms.reshape(-1, case.columns).sum(0)
    dw_size = None if dw is None else torch.maximum(dw.norm(), terms.norm()).reshape(1)
    sizes = {"dx": (r * m).norm(dim=-1, keepdim=True), "dw": dw_size}
    return Results(normed * scale, dx, dw), sizes


# ------------------------------------------------------------------------------------------ errors


def error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """||got - want|| / ||want||, each row first divided by its own size (by default its norm)."""
    want = want.double()
    if size is None:
        size = want.norm(dim=-1, keepdim=True)
    inverse = torch.where(size > 0, 1 / size, 1.0)
    difference = ((got.double() - want) * inverse).norm()
    return float(difference / max(1.0, size.numel()) ** 0.5)


def allowed(eager_error: float, dtype: torch.dtype, elements: int) -> float:
    """1.5 times the eager error, and a floor where that error is a matter of luck.

    Half precision needs a floor only where few elements were rounded: half a unit in the last
    place, the most that one rounding can do. One rounding of many elements comes to 0.4 of it.
    """
    floor = FLOOR_FLOAT32
    if dtype != torch.float32:
        floor = torch.finfo(dtype).eps / 2 if elements < 256 else 0.0
    return max(1.5 * eager_error, floor)


def check(case: Case, got: Results, x: Tensor, weight: Tensor | None, dy: Tensor) -> None:
    """Fail unless every result has the right shape and dtype and lies near enough to the oracle."""
    want, sizes = exact(case, x, weight, dy)
    plain = eager(case, x, weight, dy)
    for name in ("y", "dx", "dw"):
        result, oracle, size = getattr(got, name), getattr(want, name), sizes.get(name)
        if oracle is None:
            assert result is None, f"{case}: {name} was returned without a request"
            continue
        like = weight if name == "dw" else x
        assert result.shape == oracle.shape, f"{case}: {name} has shape {tuple(result.shape)}"
        assert result.dtype == like.dtype, f"{case}: {name} is {result.dtype}"
        assert result.device == x.device, f"{case}: {name} is on {result.device}"
        if not result.numel():
            continue
        mine = error(result, oracle, size)
        limit = allowed(error(getattr(plain, name), oracle, size), result.dtype, result.numel())
        assert mine <= limit, f"{case}: error of {name} is {mine:.3g}, allowed are {limit:.3g}"


def check_roundings(case: Case, y: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """Fail unless y rounds where its casting says: bit for bit the eager form's, but for one
    element in a thousand, where the two float32 results lie at both sides of a rounding boundary;
    and clearly other bits than the other castings', where those differ."""

    def share(casting: str) -> float:
        plain = eager_forward(x, weight, case.eps, casting, case.offset)
        return float((plain == y).float().mean())

    assert share(case.casting) >= 0.999, f"{case}: {share(case.casting):.2%} of the bits"
    if weight is not None:
        other = "llama" if case.casting == "gemma" else "gemma"
        assert share(other) < 0.9, (
            f"{case}: {share(other):.2%} of {other}'s bits, where few are due"
        )


def check_roundings_of_dw(
    case: Case, dw: Tensor, x: Tensor, weight: Tensor | None, dy: Tensor
) -> None:
    """Fail unless dW's terms are rounded where the casting says: as autograd of Llama's module
    rounds them, or, as in Gemma's, not at all. Relative to the distance between these two, dW is
    near its own one: a few elements at most fall to the other side of the last rounding."""
    rounded, unrounded = (
        eager(replace(case, casting=casting), x, weight, dy).dw for casting in ("llama", "gemma")
    )
    own, other = (rounded, unrounded) if case.casting == "llama" else (unrounded, rounded)
    apart = error(other, own)
    assert apart > 0, f"{case}: too few terms to tell the castings apart"
    assert error(dw, own) <= 0.5 * apart, f"{case}: {error(dw, own):.2g} of {apart:.2g} off"


def check_promises(case: Case, device: torch.device) -> None:
    """Fail unless the registered operators return what their fake forms say, strides included."""
    x, weight, dy = inputs(case, device)
    numbers, modes = (case.eps, case.casting, case.offset), (case.row_mode, case.rule)
    operators = torch.ops.onelaunch
    for operator, arguments in (
        (operators.rms_norm, (x, weight, *numbers, *modes)),
        (operators.rms_norm_backward, (dy, x, weight, *numbers, weight is not None, *modes)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")


# ------------------------------------------------------------------------------------------ matrix


def semantics(dtype: torch.dtype, other: torch.dtype) -> list[dict]:
    """Every casting with every weight (none, of x's dtype, of another), offset and in_place."""
    weights = [(None, 0.0), *product((dtype, other), (0.0, 1.0))]
    return [
        {
            "dtype": dtype,
            "weight_dtype": weight_dtype,
            "casting": casting,
            "offset": offset,
            "in_place": in_place,
        }
        for casting, (weight_dtype, offset), in_place in product(CASTINGS, weights, (False, True))
    ]


def source_matrix(
    dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, int], ...]
) -> list[Case]:
    """The matrix of Liger-Kernel#1238's own test: Llama, Gemma and base, in place or not, with and
    without a weight, by the published rule."""
    return [
        Case(
            shape,
            dtype,
            dtype if affine else None,
            casting,
            1.0 if affine and casting == "gemma" else 0.0,
            in_place=in_place,
            rule="source",
        )
        for dtype, shape, casting, in_place, affine in product(
            dtypes, shapes, CASTINGS, (False, True), (True, False)
        )
    ]


STRIDED = [
    # x layout, dY layout, shape
    ("q of packed qkv", "contiguous", (2, 5, 3, 64)),
    ("q of packed qkv", "q of packed qkv", (2, 5, 3, 64)),
    ("heads first", "heads first", (2, 3, 5, 64)),
    ("heads first", "contiguous", (2, 3, 5, 96)),
    ("contiguous", "heads first", (2, 3, 5, 96)),
    ("padded rows", "padded rows", (9, 64)),
    ("shifted", "shifted", (9, 64)),
    ("contiguous", "shifted", (9, 96)),
    ("expanded", "contiguous", (9, 64)),
    ("contiguous", "expanded", (9, 64)),
    ("contiguous", "scalar", (9, 64)),
    ("q of packed qkv", "scalar", (2, 5, 3, 64)),
    ("every other column", "contiguous", (9, 64)),
    ("contiguous", "every other column", (9, 64)),
    ("columns first", "columns first", (9, 64)),
    ("columns first", "columns first", (2, 5, 3, 64)),
    ("contiguous", "contiguous", (64,)),
    ("shifted", "scalar", (64,)),
    ("contiguous", "contiguous", (1, 1, 1, 1)),
]
