"""The C extension, over a fake driver that records its calls. Needs Triton, which compiles it."""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onelaunch.operators.handles import Handle
from onelaunch.operators.sequence import compile_extension

pytestmark = pytest.mark.extended

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Config(ctypes.Structure):
    """CUlaunchConfig, as cuda.h of CUDA 11.8 to 13 has it."""

    _fields_ = (
        *[(f"grid_{axis}", ctypes.c_uint) for axis in "xyz"],
        *[(f"block_{axis}", ctypes.c_uint) for axis in "xyz"],
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class Driver:
    """A fake cuLaunchKernelEx that records its arguments and returns `status`."""

    def __init__(self, parameters, status=0):
        self.launched = []
        self.status = status

        def launch(config, function, values, extra):
            one = ctypes.cast(config, ctypes.POINTER(Config)).contents
            raw = [ctypes.string_at(values[i], size) for i, size in enumerate(parameters[function])]
            self.launched.append(
                (
                    function,
                    (one.grid_x, one.grid_y, one.grid_z),
                    (one.block_x, one.block_y, one.block_z),
                    one.shared_bytes,
                    one.stream,
                    one.attribute_count,
                    raw,
                )
            )
            return self.status

        self._callback = LAUNCH(launch)
        self.address = ctypes.cast(self._callback, ctypes.c_void_p).value


def pointer(tensor):
    return struct.pack("<Q", tensor.data_ptr())


FIRST = Handle(11, 7, 64, 1024, False, (None, None, None, 5, 0, 0), 0)
SECOND = Handle(22, 3, 256, 0, True, (None, None, (1 << 63) + 9, 0, 0), 0)
SIZES = {11: (8, 8, 8, 4, 8, 8), 22: (8, 8, 8, 8, 8)}


@pytest.fixture
def sequence():
    """A function that makes a recording driver and the extension's Sequence over it."""
    pytest.importorskip("triton")
    extension = compile_extension()

    def make(results=(2, 3), status=0, device=0, current=0, twin=None, empty=None):
        driver = Driver(SIZES, status)
        launches = (FIRST.as_tuple((0, 2, 4)), SECOND.as_tuple((4, 3)))
        made = empty or [((2, 3), (3, 1), torch.float32), ((3,), (1,), torch.bfloat16)]
        partials = ((4, 3), (3, 1), torch.float32)
        return driver, extension.Sequence(
            2,
            torch._C._dynamo.guards._empty_strided_cpu,
            (*made, partials),
            launches,
            results,
            torch.Tensor.data_ptr,
            lambda: current,
            lambda index: 77 + index,
            device,
            twin or (lambda *tensors: "twin"),
            driver.address,
        )

    return make


def test_tensors_are_made_and_kernels_launched_in_order(sequence):
    driver, run = sequence()
    x, w = torch.randn(2, 3), torch.randn(3)
    dx, dw = run(x, w)
    assert (dx.shape, dx.dtype, dx.stride()) == ((2, 3), torch.float32, (3, 1))
    assert (dw.shape, dw.dtype) == ((3,), torch.bfloat16)
    first, second = driver.launched
    assert first[:-1] == (11, (7, 1, 1), (64, 1, 1), 1024, 77, 0)
    assert second[:-1] == (22, (3, 1, 1), (256, 1, 1), 0, 77, 1)
    partials = first[-1][2]
    zero = struct.pack("<Q", 0)
    assert first[-1] == [pointer(x), pointer(dx), partials, struct.pack("<i", 5), zero, zero]
    assert second[-1] == [partials, pointer(dw), struct.pack("<Q", (1 << 63) + 9), zero, zero]
    assert partials not in (pointer(x), pointer(w), pointer(dx), pointer(dw))


def test_one_result_is_a_tensor_and_an_input_is_itself(sequence):
    x, w = torch.randn(2, 3), torch.randn(3)
    assert sequence(results=(2,))[1](x, w).shape == (2, 3)
    assert sequence(results=(0,))[1](x, w) is x
    assert sequence(results=(0, 3))[1](x, w)[0] is x


def test_the_twin_serves_where_another_device_is_current(sequence):
    x, w = torch.randn(2, 3), torch.randn(3)
    driver, run = sequence(device=1, twin=lambda *tensors: tensors)
    assert run(x, w) == (x, w)
    assert not driver.launched


def test_the_twin_serves_a_thread_without_a_context(sequence):
    x, w = torch.randn(2, 3), torch.randn(3)
    driver, run = sequence(status=201, twin=lambda *tensors: tensors)
    assert run(x, w) == (x, w)
    assert len(driver.launched) == 1


def test_a_launch_that_fails_says_its_number(sequence):
    driver, run = sequence(status=700)
    with pytest.raises(RuntimeError, match="CUDA error 700 .*launch 1 of 2"):
        run(torch.randn(2, 3), torch.randn(3))
    assert len(driver.launched) == 1


@pytest.mark.parametrize("wrong", [(), (torch.ones(1),), (torch.ones(1),) * 3, (1, 2), ("x", None)])
def test_wrong_arguments_raise_and_launch_nothing(sequence, wrong):
    driver, run = sequence()
    with pytest.raises(TypeError):
        run(*wrong)
    assert not driver.launched


def test_names_are_refused(sequence):
    _, run = sequence()
    with pytest.raises(TypeError):
        run(torch.ones(1), w=torch.ones(1))


def test_an_allocation_error_is_raised(sequence):
    driver, run = sequence(empty=[((2, -3), (3, 1), torch.float32), ((3,), (1,), torch.bfloat16)])
    with pytest.raises(RuntimeError):
        run(torch.randn(2, 3), torch.randn(3))
    assert not driver.launched


@pytest.mark.parametrize("results", [(), (5,), (-1,), ("x",), tuple(range(5)) * 4])
def test_unknown_results_are_refused(sequence, results):
    with pytest.raises((ValueError, TypeError)):
        sequence(results=results)


def test_too_many_tensors_are_refused(sequence):
    with pytest.raises(ValueError, match="too many"):
        sequence(empty=[((1,), (1,), torch.float32)] * 20)


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_is_kept_or_leaked(sequence):
    x, w = torch.randn(2, 3), torch.randn(3)
    driver, run = sequence()
    kept = weakref.ref(run(x, w)[0])
    gc.collect()
    assert kept() is None
    for _ in range(2000):
        run(x, w)
    driver.launched.clear()
    before = resident_bytes()
    for _ in range(20):
        for _ in range(1000):
            run(x, w)
        driver.launched.clear()
    assert resident_bytes() - before < 4 << 20  # a tensor a call would be 8 MB at the least
    twin = weakref.ref(kept_twin := (lambda *tensors: None))
    made = sequence(twin=kept_twin)
    del kept_twin, made
    gc.collect()
    assert twin() is None


def test_many_threads(sequence):
    driver, run = sequence()
    wrong = []

    def work():
        for _ in range(300):
            x = torch.randn(2, 3)
            dx, dw = run(x, torch.randn(3))
            if dx.shape != (2, 3) or dw.shape != (3,):
                wrong.append(dx)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(driver.launched) == 4 * 300 * 2


# ------------------------------------------------------------------------------ autograd's backward


class Prepared:
    def __init__(self, *recent):
        self.recent_backward = recent


def doubled(dy, x, weight):
    return 2 * dy, 3 * weight


@pytest.fixture
def function():
    """Makes an autograd.Function whose node calls the extension, and its list of fallbacks."""
    pytest.importorskip("triton")
    extension = compile_extension()

    def make(prepared):
        fell_back = []

        class Known(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, last):
                ctx.save_for_backward(x, weight)
                ctx.prepared = prepared
                return x * 1

            @staticmethod
            def backward(ctx, dy):
                raise AssertionError("its `apply` is called")

        def fallback(ctx, dy, x, weight):
            assert isinstance(ctx, Known._backward_cls)
            fell_back.append(dy)
            return 5 * dy, None if weight is None else 7 * weight, None

        apply = extension.Backward(
            torch.is_grad_enabled,
            torch._C._len_torch_dispatch_stack,
            torch.Tensor.data_ptr,
            fallback,
        )
        Known._backward_cls.apply = apply
        return Known, fell_back

    return make


def differentiated(known, weight_grad=True, **how):
    x = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(4, requires_grad=weight_grad)
    y = known.apply(x, weight, None)
    dy = torch.ones(2, 4)
    inputs = (x, weight) if weight_grad else (x,)
    return weight, torch.autograd.grad(y, inputs, dy, **how)


def test_the_gradients_are_those_of_the_matching_entry(function):
    prepared = Prepared(
        (lambda *tensors: False, True, None),
        (lambda *tensors: True, False, None),
        (lambda *tensors: True, True, doubled),
    )
    known, fell_back = function(prepared)
    weight, (dx, dw) = differentiated(known)
    assert torch.equal(dx, torch.full((2, 4), 2.0))
    assert torch.equal(dw, 3 * weight)
    assert not fell_back


def test_a_function_without_the_weights_gradient(function):
    known, fell_back = function(
        Prepared((lambda *tensors: True, False, lambda dy, x, weight: (4 * dy, None)))
    )
    _, (dx,) = differentiated(known, weight_grad=False)
    assert torch.equal(dx, torch.full((2, 4), 4.0))
    assert not fell_back


@pytest.mark.parametrize(
    "recent",
    [
        (),
        ((lambda *tensors: False, True, doubled),),
        ((lambda *tensors: True, False, doubled),),
        ((lambda *tensors: True, True, lambda *tensors: "neither"),),
        ((lambda *tensors: True, True),),
    ],
)
def test_python_runs_where_no_entry_matches(function, recent):
    known, fell_back = function(Prepared(*recent))
    weight, (dx, dw) = differentiated(known)
    assert torch.equal(dx, torch.full((2, 4), 5.0))
    assert torch.equal(dw, 7 * weight)
    assert len(fell_back) == 1


def test_python_runs_where_gradients_are_recorded(function):
    known, fell_back = function(Prepared((lambda *tensors: True, True, doubled)))
    differentiated(known, create_graph=True)
    assert len(fell_back) == 1


def test_python_runs_where_a_dispatch_mode_is_on(function):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    known, fell_back = function(Prepared((lambda *tensors: True, True, doubled)))
    with Mode():
        differentiated(known)
    assert len(fell_back) == 1


def test_python_runs_where_an_address_is_not_aligned(function):
    known, fell_back = function(Prepared((lambda *tensors: True, True, doubled)))
    x = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(4, requires_grad=True)
    shifted = torch.ones(9)[1:].view(2, 4)
    assert shifted.data_ptr() % 16
    torch.autograd.grad(known.apply(x, weight, None), (x, weight), shifted)
    assert len(fell_back) == 1


def test_python_runs_where_there_is_no_weight(function):
    known, fell_back = function(Prepared((lambda *tensors: True, True, doubled)))
    x = torch.randn(2, 4, requires_grad=True)
    torch.autograd.grad(known.apply(x, None, None), x, torch.ones(2, 4))
    assert len(fell_back) == 1


@pytest.mark.parametrize("where", ["guard", "function", "prepared"])
def test_errors_are_passed_on(function, where):
    def fails(*tensors):
        raise KeyError(where)

    recent = (
        fails if where == "guard" else lambda *tensors: True,
        True,
        fails if where == "function" else doubled,
    )
    known, fell_back = function(object() if where == "prepared" else Prepared(recent))
    with pytest.raises(AttributeError if where == "prepared" else KeyError):
        differentiated(known)
    assert not fell_back


@pytest.mark.parametrize("recent", [(), ((lambda *tensors: True, True, doubled),)])
def test_saved_tensors_are_unpacked_once(function, recent):
    """Checkpointing refuses a second time."""
    known, _ = function(Prepared(*recent))
    unpacked = []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
        differentiated(known)
    assert len(unpacked) == 2


def test_wrong_calls_of_apply_are_refused(function):
    known, _ = function(Prepared())
    for wrong in ((), (1,), (1, 2, 3)):
        with pytest.raises(TypeError):
            known._backward_cls.apply(*wrong)
    with pytest.raises(AttributeError):
        known._backward_cls.apply(object(), torch.ones(1))


def test_backward_keeps_nothing(function):
    known, _ = function(Prepared((lambda *tensors: True, True, doubled)))
    for _ in range(500):
        differentiated(known)
    before = resident_bytes()
    for _ in range(20_000):
        differentiated(known)
    assert resident_bytes() - before < 4 << 20
