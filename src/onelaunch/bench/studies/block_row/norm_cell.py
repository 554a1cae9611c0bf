"""One shape of RMSNorm on one device: its buffers, its three passes, its float64 result, and the
times of several contenders on it.

Passes: `forward` (nothing needs a gradient), `full` (forward, then the gradients of x and weight
through autograd), `backward` (the gradients alone, from a forward made beforehand).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from onelaunch.bench.core.record import Log
from onelaunch.bench.core.timing import (
    Call,
    Replay,
    buffer_sets,
    calls_in_turn,
    capture,
    graph_calls,
    replays_in_turn,
    synchronizer,
)
from onelaunch.bench.peers.rms_norm import EPS, Contender, Norm
from onelaunch.compilation.background import in_a_line

T = TypeVar("T")
PASSES = ("forward", "full", "backward")

# Tensors of x's size that a pass must read or write: x and y; x and dy and dx; both passes.
TENSORS_MOVED = {"forward": 2, "backward": 3, "full": 5}
# Tensors of x's size that one set of buffers holds, outputs included.
TENSORS_HELD = {"forward": 2, "backward": 3, "full": 4}
# What a call takes at least, for the length of a graph: launches, and a memory of 4 TB/s.
LAUNCH_US = {"forward": 2.0, "backward": 6.0, "full": 8.0}
BYTES_PER_US = 4e6

# No contender is timed on a result further from float64 than this. y and dX: the worst row's
# distance, relative to that row; two or three roundings to bfloat16 make 0.003 to 0.01 of it, one
# wrong row among any number about 1. dW, which no row has for itself: that of the whole.
ROW_BOUNDS = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 3e-5}
WHOLE_BOUNDS = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-5}


class WrongResult(Exception):
    """A contender's result is not what it should be."""


class Oracle(NamedTuple):
    """Float64 results on the first set of buffers."""

    y: Tensor
    dx: Tensor
    dw: Tensor


def shape_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a record's row, whose case begins with them."""
    rows, columns = row["case"].split()[0].split("x")
    return int(rows), int(columns)


def bytes_moved(rows: int, columns: int, pass_: str, element_bytes: int) -> int:
    """The bytes that a pass must at least read and write, the weight's few bytes left out."""
    return TENSORS_MOVED[pass_] * rows * columns * element_bytes


class Cell:
    """Buffers of one shape. `sets` of None: as many as exceed the device's L2."""

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        sets: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.columns, self.dtype, self.device = rows, columns, dtype, device
        self._l2_bytes = l2_bytes(device)
        if sets is None:
            # The pass that holds least needs most sets.
            sets = buffer_sets(self.set_bytes("forward"), self._l2_bytes)
        self.sets = sets
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        # Near one: a contender that writes dX over the gradient multiplies by the weight at each
        # use of a buffer, and must stay finite between two calls of `restore`.
        weight = (1 + 0.1 * normal(columns).float()).clamp(0.7, 1.3).to(dtype)
        self.weight = weight.requires_grad_()
        self.x = [normal(rows, columns).requires_grad_() for _ in range(sets)]
        self.dy = [normal(rows, columns) for _ in range(sets)]
        self._dy_as_made = [dy.clone() for dy in self.dy]
        self._oracle: Oracle | None = None

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.columns}"

    def set_bytes(self, pass_: str) -> int:
        """Bytes of one set of buffers."""
        return TENSORS_HELD[pass_] * self.rows * self.columns * self.dtype.itemsize

    def sets_for(self, pass_: str) -> int:
        """The number of sets that a pass walks."""
        return min(self.sets, buffer_sets(self.set_bytes(pass_), self._l2_bytes))

    def in_cache(self, pass_: str) -> bool:
        """Whether the sets hold less than twice the L2, as MAX_SETS of small ones do: calls then
        find input in it, and the memory's floor is none."""
        return self.sets_for(pass_) * self.set_bytes(pass_) < 2 * self._l2_bytes

    def graph_calls(self, pass_: str) -> int:
        """Calls in one graph of this pass."""
        moved = bytes_moved(self.rows, self.columns, pass_, self.dtype.itemsize)
        return graph_calls(LAUNCH_US[pass_] + moved / BYTES_PER_US, self.sets_for(pass_))

    def call(self, pass_: str, norm: Norm) -> Call:
        """A pass as a call on the i-th set. Its outputs: y; y, dx, dw; dx, dw."""
        x, dy, weight = self.x, self.dy, self.weight
        if pass_ == "forward":
            # Without requires_grad at all: under no_grad some peers would still keep what only a
            # backward pass needs.
            plain_x, plain_weight = [one.detach() for one in x], weight.detach()
            return lambda i: (norm(plain_x[i], plain_weight),)
        if pass_ == "full":

            def full(i: int) -> tuple[Tensor, ...]:
                y = norm(x[i], weight)
                return y, *torch.autograd.grad(y, (x[i], weight), dy[i])

            return full
        ys = [norm(one, weight) for one in x[: self.sets_for(pass_)]]
        return lambda i: torch.autograd.grad(ys[i], (x[i], weight), dy[i], retain_graph=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the gradients that an in-place contender wrote over."""
        for dy, as_made in zip(self.dy, self._dy_as_made, strict=True):
            dy.copy_(as_made)

    @property
    @torch.no_grad()
    def oracle(self) -> Oracle:
        if self._oracle is None:
            x, dy, w = (t.double() for t in (self.x[0], self._dy_as_made[0], self.weight))
            rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
            x_hat = x * rstd
            g = dy * w
            dx = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
            self._oracle = Oracle(x_hat * w, dx, (dy * x_hat).sum(0))
        return self._oracle

    @torch.no_grad()
    def check(self, pass_: str, outputs: Sequence[Tensor]) -> None:
        """Raise WrongResult unless the outputs on the first set are within the bound."""
        names = {"forward": ("y",), "full": ("y", "dx", "dw"), "backward": ("dx", "dw")}[pass_]
        for name, output in zip(names, outputs, strict=True):
            expected = getattr(self.oracle, name)
            off = output.double() - expected
            if name == "dw":
                error, bound = (off.norm() / expected.norm()).item(), WHOLE_BOUNDS[self.dtype]
            else:
                by_row = off.norm(dim=-1) / expected.norm(dim=-1)
                error, bound = by_row.max().item(), ROW_BOUNDS[self.dtype]
            if not error <= bound:
                raise WrongResult(f"{name} is {error:.2g} off float64")


def l2_bytes(device: torch.device) -> int:
    """A GPU's L2; for a CPU 32 MB, a usual last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 32 << 20


class Made(NamedTuple):
    """A contender's norms for one shape: that of most passes, and that of the backward pass alone,
    which runs again and again on one graph; None where the contender has none."""

    contender: Contender
    norm: Norm
    backward: Norm | None


def make(contenders: Sequence[Contender], log: Log) -> list[Made]:
    """Every contender's norms, made anew."""
    made = []
    for each in contenders:
        norm = each.fresh()
        backward: Norm | None = norm
        try:
            backward = each.repeatable() if each.repeatable else norm
        except Exception as error:
            log(f"  backward passes without {each.name}: {in_a_line(error)}")
            backward = None
        made.append(Made(each, norm, backward))
    return made


def kernel_times(
    cell: Cell, pass_: str, made: Sequence[Made], samples: int, log: Log
) -> dict[str, list[float]]:
    """Microseconds a call by replay, of every contender that gives the right result. To be called
    on a stream that is not the default one. A contender that cannot be captured, or is wrong, is
    left out, and a line says so."""

    def captured(call: Call) -> Replay:
        _check_replayed(cell, pass_, call)
        return capture(call, cell.sets_for(pass_), cell.graph_calls(pass_))

    replays = _right(cell, pass_, made, captured, log)
    restore = _restorer(cell, made if pass_ != "forward" else ())
    return replays_in_turn(replays, samples, restore) if replays else {}


def host_times(
    cell: Cell, pass_: str, made: Sequence[Made], repeats: int, samples: int, log: Log
) -> dict[str, list[float]]:
    """Microseconds a call, the host's part included, of every contender that gives the right
    result; `repeats` calls a sample."""

    def checked(call: Call) -> Call:
        cell.restore()
        cell.check(pass_, call(0))
        return call

    calls = _right(cell, pass_, made, checked, log)
    wait, restore = synchronizer(cell.device), _restorer(cell, made)
    if not calls:
        return {}
    return calls_in_turn(calls, cell.sets_for(pass_), repeats, samples, wait, restore)


def _right(
    cell: Cell, pass_: str, made: Sequence[Made], checked: Callable[[Call], T], log: Log
) -> dict[str, T]:
    """The results of `checked` by contender; one that fails is left out, with a line."""
    right = {}
    for contender, norm, backward in made:
        which = backward if pass_ == "backward" else norm
        if which is None:
            continue
        try:
            right[contender.name] = checked(cell.call(pass_, which))
        except Exception as error:
            log(f"  {cell.shape} {pass_} without {contender.name}: {in_a_line(error)}")
    return right


def _restorer(cell: Cell, made: Sequence[Made]) -> Log:
    """A function that restores gradients before a pass that overwrites them."""
    in_place = {each.contender.name for each in made if each.contender.in_place}

    def before(name: str) -> None:
        if name in in_place:
            cell.restore()

    return before


def _check_replayed(cell: Cell, pass_: str, call: Call) -> None:
    """Check what a graph of one call writes over NaNs: a contender that launches its kernels
    elsewhere than on the captured stream would be timed on nothing."""
    replay = capture(call, 1, 1)
    outputs = replay.kept[0]
    for output in outputs:
        output.detach().fill_(float("nan"))
    cell.restore()
    replay.graph.replay()
    synchronizer(cell.device)()
    cell.check(pass_, outputs)
    cell.restore()


def peak_bytes(cell: Cell, norm: Norm) -> int:
    """The bytes that a forward and backward pass adds to the peak memory, as requested: without
    what the allocator adds to each piece, where it counts that apart (CUDA)."""
    call = cell.call("full", norm)
    call(0)
    cell.restore()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(cell.device)
    counted = torch.cuda.memory_stats(cell.device)
    kind = "requested" if "requested_bytes.all.peak" in counted else "allocated"
    before = counted[f"{kind}_bytes.all.current"]
    outputs = call(0)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats(cell.device)[f"{kind}_bytes.all.peak"] - before
    del outputs
    cell.restore()
    return peak


def each_reason_once(log: Log) -> Log:
    """Passes a line that leaves out a contender on only where contender and reason are new: a
    missing compiler is missing at every shape."""
    seen: set[str] = set()

    def say_new(line: str) -> None:
        _, left_out, reason = line.partition(" without ")
        if left_out and reason in seen:
            return
        seen.add(reason)
        log(line)

    return say_new
