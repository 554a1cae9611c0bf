"""RMSNorm on a GPU as a program sees it: launches, memory, streams, graphs, the compiler."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from onelaunch import RMSNorm, rms_norm
from onelaunch.operators import sequence
from onelaunch.operators.rms_norm import launch
from tests.operators.rms_norm.suite import (
    CASTINGS,
    Case,
    assert_same,
    check,
    gradients,
    inputs,
    run,
)

CUDA = torch.device("cuda", 0)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Shapes on which the backward takes several programs, so that there are partials to add.
LARGE = Case((8192, 512), BF16, BF16)


# ------------------------------------------------------------------------------------- launches


# What the profiler notes about itself, on the device's time line too.
PROFILER_ITSELF = (
    "Activity Buffer Request",
    "Buffer Flush",
    "Command Buffer Full",
    "Lazy Function Loading",
)


def launches(function: Callable[[], object]) -> list[str]:
    """What the device did for one call: kernels, copies and fills, by name."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as told:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in told.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if name not in PROFILER_ITSELF]


def test_the_profiler_sees_what_the_device_does():
    a = torch.ones(1000, device=CUDA)
    assert len(launches(lambda: a.clone())) == 1
    assert len(launches(lambda: torch.zeros(1000, device=CUDA))) == 1
    assert len(launches(lambda: a.sin().cos())) == 2


@pytest.mark.parametrize(
    ("x_layout", "dy_layout", "shape"),
    [
        ("contiguous", "contiguous", (8192, 512)),
        ("contiguous", "contiguous", (5, 96)),
        ("contiguous", "contiguous", (4096, 64)),
        ("contiguous", "contiguous", (600, 20_000)),
        ("q of packed qkv", "contiguous", (4, 64, 8, 64)),
        ("q of packed qkv", "q of packed qkv", (4, 64, 8, 64)),
        ("heads first", "heads first", (4, 8, 64, 64)),
        ("padded rows", "padded rows", (999, 96)),
        ("expanded", "contiguous", (999, 96)),
        ("contiguous", "expanded", (999, 96)),
    ],
)
def test_one_launch_forward_and_at_most_two_backward(x_layout, dy_layout, shape):
    """No fill, no copy: of strided tensors neither."""
    case = Case(shape, BF16, BF16, x_layout=x_layout, dy_layout=dy_layout)
    x, weight, dy = inputs(case, CUDA)
    assert len(launches(lambda: rms_norm(x, weight))) == 1
    x.requires_grad_()
    assert len(launches(lambda: rms_norm(x, weight))) == 1
    frozen = rms_norm(x, weight)
    once = launches(lambda: torch.autograd.grad(frozen, x, dy, retain_graph=True))
    assert len(once) == 1, once
    weight.requires_grad_()
    y = rms_norm(x, weight)
    both = launches(lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True))
    assert len(both) <= 2, both
    assert not [name for name in (*once, *both) if "mem" in name.lower() or "fill" in name.lower()]


def test_no_rows_cost_no_kernel():
    x = torch.empty(0, 64, device=CUDA, requires_grad=True)
    weight = torch.ones(64, device=CUDA)
    assert launches(lambda: rms_norm(x, weight)) == []
    y = rms_norm(x, weight)
    assert launches(lambda: torch.autograd.grad(y, x, y.detach(), retain_graph=True)) == []


# --------------------------------------------------------------------------------------- memory


def extra_bytes(function: Callable[[], object]) -> int:
    """The peak of what one call asks the allocator for, its result included."""
    kept = function()
    del kept
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = function()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    del kept
    return peak - before


@pytest.mark.parametrize("shape", [(32768, 512), (131072, 64), (4096, 4096), (600, 20_000)])
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_is_allocated_but_results_and_partials(shape, in_place):
    case = Case(shape, BF16, BF16, in_place=in_place)
    x, weight, dy = inputs(case, CUDA)
    plan = case.plans(CUDA)[1]
    assert 1 < plan.partials <= 16 * torch.cuda.get_device_properties(CUDA).multi_processor_count
    size = x.numel() * x.element_size()
    x.requires_grad_()
    weight.requires_grad_()

    frozen = weight.detach()

    def forward(weight):
        return rms_norm(x, weight, in_place=in_place)

    with torch.no_grad():
        assert extra_bytes(lambda: forward(weight)) <= size
    assert extra_bytes(lambda: forward(weight)) <= size
    y, y_frozen = forward(weight), forward(frozen)
    dx = 0 if in_place else size
    partials = plan.partials * case.columns * 4

    def backward(y, *wanted):
        return torch.autograd.grad(y, wanted, dy, retain_graph=True)

    assert extra_bytes(lambda: backward(y_frozen, x)) <= dx
    assert extra_bytes(lambda: backward(y, x, weight)) <= dx + partials + case.columns * 2


# ------------------------------------------------------------------------------ streams and graphs


def test_two_streams_do_not_disturb_each_other():
    """They share compiled kernels and nothing that is written."""
    cases = [replace(LARGE, eps=eps) for eps in (1e-6, 1e-5)]
    tensors = [inputs(case, CUDA, seed) for seed, case in enumerate(cases)]
    want = [run(case, *given) for case, given in zip(cases, tensors, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    got = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(run(cases[i], *tensors[i]))
    torch.cuda.synchronize()
    for right, results in zip(want, got, strict=True):
        for result in results:
            assert_same((result.y, result.dx, result.dw), (right.y, right.dx, right.dw))


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("shape", [(4099, 96), (3, 64), (300, 20_000)])
def test_a_cuda_graph_replays_forward_and_backward(shape, casting):
    case = Case(shape, BF16, F32, casting)
    x, weight, dy = inputs(case, CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, x, weight, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, x, weight, dy)
    for seed in (1, 2):
        for static, new in zip((x, weight, dy), inputs(case, CUDA, seed), strict=True):
            static.copy_(new)
        for result in (captured.y, captured.dx, captured.dw):
            result.fill_(float("nan"))
        graph.replay()
        want = run(case, x, weight, dy)
        assert_same((captured.y, captured.dx, captured.dw), (want.y, want.dx, want.dw))


CASES_OF_BOTH = [
    Case((8192, 512), BF16, BF16),
    Case((4099, 96), BF16, F32, "gemma"),
    Case((3, 64), F16, F16, row_mode="block"),  # one program holds all of dW
    Case((300, 20_000), F32, BF16),  # chunked
    Case((4096, 1), BF16, BF16),  # numbers that are 1 are no parameters
]


def remembered(case, x, weight):
    """What a call of these settings has bound."""
    s = launch.settings(
        case.eps, case.casting, case.offset, case.in_place, case.row_mode, case.rule
    )
    prepared = launch.prepare(x, weight, s)
    return [prepared.forward, *prepared.backward.values()]


@pytest.mark.parametrize("case", CASES_OF_BOTH, ids=str)
def test_one_call_in_c_does_what_python_does(case, monkeypatch):
    """Bit for bit, over fresh memory that holds NaNs."""
    given = inputs(case, CUDA)
    monkeypatch.setattr(launch, "_settings", {})
    in_c = run(case, *given)
    bound = remembered(case, *given[:2])
    assert len(bound) > 1
    assert {type(one).__name__ for one in bound} == {"Sequence"}
    monkeypatch.setattr(launch, "_settings", {})
    monkeypatch.setattr(launch, "sequence", sequence.python_twin)
    in_python = run(case, *given)
    assert {type(one).__name__ for one in remembered(case, *given[:2])} == {"function"}
    assert_same((in_c.y, in_c.dx, in_c.dw), (in_python.y, in_python.dx, in_python.dw))
    torch.full((1 << 24,), float("nan"), device=CUDA)  # freed, and taken by what follows
    monkeypatch.undo()
    again = run(case, *given)
    assert_same((in_c.y, in_c.dx, in_c.dw), (again.y, again.dx, again.dw))


def test_threads_with_streams_of_their_own():
    """New threads have no CUDA context until something makes it current."""
    cases = [replace(LARGE, eps=eps) for eps in (1e-6, 1e-5, 1e-4, 1e-3)]
    tensors = [inputs(case, CUDA, seed) for seed, case in enumerate(cases)]
    want = [run(case, *given) for case, given in zip(cases, tensors, strict=True)]
    torch.cuda.synchronize()
    got = [[] for _ in cases]

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            for _ in range(20):
                got[i].append(run(cases[i], *tensors[i]))
            torch.cuda.current_stream().synchronize()

    def bare(i):
        got[i].append(run(cases[i], *tensors[i]))

    for target in (bare, work):
        threads = [threading.Thread(target=target, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.cuda.synchronize()
    for right, results in zip(want, got, strict=True):
        assert len(results) == 21
        for result in results:
            assert_same((result.y, result.dx, result.dw), (right.y, right.dx, right.dw))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for dtype in (BF16, F32):
        case = Case((300, 96), dtype, dtype)
        first, second = (inputs(case, torch.device("cuda", i)) for i in (0, 1))
        for given in (first, second, first):
            check(case, run(case, *given), *given)
    assert torch.cuda.current_device() == 0


# ------------------------------------------------------------------------------------ the compiler


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("casting", "offset"), [("llama", 0.0), ("gemma", 1.0), ("none", 0.0)])
def test_compiled_whole_equals_eager_bit_for_bit(casting, offset):
    """Alone, the operator runs the same kernels under Inductor."""

    def norm(x, weight):
        return rms_norm(x, weight, casting=casting, offset=offset)

    x, weight, _ = inputs(replace(LARGE, casting=casting, offset=offset), CUDA)
    compiled = torch.compile(norm, fullgraph=True)
    assert_same(gradients(compiled, x, weight), gradients(norm, x, weight))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_network_with_odd_strides():
    """Queries of a packed projection: the compiler hands the operator a view and gets one back."""

    def attend(x, weight):
        q, k, v = x.unflatten(-1, (3, 4, 64)).unbind(-3)
        q, k = rms_norm(q, weight).transpose(1, 2), rms_norm(k, weight).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).float()

    x, weight = torch.randn(2, 10, 768, device=CUDA), torch.rand(64, device=CUDA)
    compiled = torch.compile(attend, fullgraph=True)
    for got, want in zip(gradients(compiled, x, weight), gradients(attend, x, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_one_compilation_serves_every_number_of_rows():
    compiled = torch.compile(lambda x, w: rms_norm(x, w) * 2, fullgraph=True, dynamic=True)
    weight = torch.rand(64, device=CUDA)

    def both(rows):
        x = torch.randn(rows, 64, device=CUDA)
        return compiled(x, weight), rms_norm(x, weight) * 2

    torch.testing.assert_close(*both(5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (8, 100, 4099):
            torch.testing.assert_close(*both(rows))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_module_with_cuda_graphs():
    norm = RMSNorm(96, device=CUDA)
    nn.init.uniform_(norm.weight)
    compiled = torch.compile(norm, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = torch.randn(33, 96, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed))
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x).clone(), norm(x))


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F32, F32), (BF16, F32), (F16, None)])
def test_the_registered_operators_pass_opcheck(dtype, weight_dtype, rows):
    x = torch.randn(rows, 96, device=CUDA).to(dtype).requires_grad_()
    weight = None
    if weight_dtype is not None:
        weight = torch.rand(96, device=CUDA).to(weight_dtype).requires_grad_()
    rest = (1e-6, "llama", 0.0)
    modes = ("auto", "tuned")
    torch.library.opcheck(torch.ops.onelaunch.rms_norm.default, (x, weight, *rest, *modes))
    x, weight = x.detach(), None if weight is None else weight.detach()
    given = (torch.randn_like(x), x, weight, *rest, weight is not None, *modes)
    torch.library.opcheck(torch.ops.onelaunch.rms_norm_backward.default, given)


# ---------------------------------------------------------------------------- autocast and others


@pytest.mark.parametrize("casting", CASTINGS)
def test_autocast_leaves_the_dtype_to_the_input(casting):
    linear = nn.Linear(64, 96, device=CUDA)
    norm = RMSNorm(96, casting=casting, device=CUDA)
    nn.init.uniform_(norm.weight)
    with torch.autocast("cuda", BF16):
        hidden = linear(torch.randn(50, 64, device=CUDA))
        y = norm(hidden)
    assert hidden.dtype == y.dtype == BF16
    case = Case((50, 96), BF16, F32, casting)
    dy = torch.randn_like(y)
    got = run(case, hidden, norm.weight, dy)
    check(case, got, hidden.detach(), norm.weight.detach(), dy)
    assert torch.equal(got.y, y)
    y.backward(dy)
    assert torch.equal(norm.weight.grad, got.dw)
    assert linear.weight.grad.dtype == F32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    x, weight, _ = inputs(LARGE, CUDA)

    def twice(x, weight):
        return rms_norm(rms_norm(x, weight) * 3, weight)

    def checkpointed(x, weight):
        return checkpoint(twice, x, weight, use_reentrant=reentrant)

    assert_same(gradients(checkpointed, x, weight), gradients(twice, x, weight))


def test_a_saved_tensor_may_wait_on_the_cpu():
    x, weight, _ = inputs(LARGE, CUDA)
    want = gradients(rms_norm, x, weight)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(rms_norm, x, weight), want)
