"""Our driver calls equal those of Triton's own launcher: both are compiled here, over a fake driver
that records its arguments."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from types import SimpleNamespace

import pytest
import torch

from onelaunch.operators import handles
from onelaunch.operators.handles import handle_of
from onelaunch.operators.rms_norm import launch
from onelaunch.operators.sequence import compile_extension
from tests.compiling import absent

pytestmark = pytest.mark.extended

DRIVER = r"""
#include <cuda.h>
#include <string.h>

static unsigned char recorded[4096];
static int sizes[64], count, length;

void expect(int n, const int *bytes) {
    count = n;
    memcpy(sizes, bytes, n * sizeof(int));
}
int length_recorded(void) { return length; }
const unsigned char *bytes_recorded(void) { return recorded; }

static void note(const void *from, int bytes) {
    memcpy(recorded + length, from, bytes);
    length += bytes;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra
) {
    length = 0;
    note(&config->gridDimX, 6 * sizeof(unsigned));
    note(&config->sharedMemBytes, sizeof(unsigned));
    note(&config->hStream, sizeof(void *));
    note(&config->numAttrs, sizeof(unsigned));
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        note(&config->attrs[i].id, sizeof(int));
        note(&config->attrs[i].value, sizeof(int));
    }
    note(&function, sizeof(void *));
    for (int i = 0; i < count; ++i) note(parameters[i], sizes[i]);
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "?"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *found) { *found = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext set) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}
"""
STREAM, FUNCTION = 77, 1234
SIZES = {"i32": 4, "i64": 8, "fp32": 4}


@functools.cache  # of the process: the linker takes the first libcuda.so.1 ever after
def recording_driver(folder):
    """The library of DRIVER, in place of libcuda.so.1, made in `folder`."""
    from triton.backends.nvidia.driver import include_dirs

    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", *[f"-I{path}" for path in include_dirs]]
    command += [str(source), "-o", str(library), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture
def driver(tmp_path_factory):
    """The recording driver and its folder."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.backends.nvidia.driver")
    if torch.cuda.is_available():
        pytest.skip("this process has a driver of its own")
    if ".".join(triton.__version__.split(".")[:2]) not in handles.KNOWN_LAUNCHERS:
        pytest.skip("of a Triton whose launcher is not called in this way")
    folder = tmp_path_factory.getbasetemp() / "driver"
    folder.mkdir(exist_ok=True)
    return recording_driver(folder), folder


def recorded(library):
    library.bytes_recorded.restype = ctypes.POINTER(ctypes.c_ubyte)
    return bytes(library.bytes_recorded()[: library.length_recorded()])


def bound_kernels(monkeypatch, x, weight):
    """Return, for the kernels of a forward and a backward: the compiled kernel, grid, tensors,
    numbers, constants, and whether it is a dependent launch."""
    from triton.runtime import driver as active

    bound = []

    def bind(kernel, grid, tensors, numbers, constants, warps, dependent=False):
        options = {"num_warps": warps} | ({"launch_pdl": True} if dependent else {})
        compiled = kernel.warmup(*tensors, *numbers, grid=(1,), **constants, **options)
        bound.append((compiled, grid, tensors, numbers, constants, dependent))
        return lambda *tensors: None

    monkeypatch.setattr(active, "_active", absent("sm_90"))
    monkeypatch.setattr(launch, "available", lambda device: True)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "dependent_launch", lambda device: True)
    monkeypatch.setattr(launch, "bind", bind)
    settings = launch.Settings(1e-5, "llama", 0.5, False, "auto", "tuned")
    launch.backward(launch.forward(x, weight, settings), x, weight, settings, True)
    return bound


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(4096, 64, dtype=torch.bfloat16),
        lambda: torch.empty(2048, 3, 4, 100)[:, 1],
        lambda: torch.empty(4096, 1),  # numbers that are 1 are constants
        lambda: torch.empty(70, 20_000, dtype=torch.float16),
    ],
    ids=["tiles", "rows at two strides", "one column", "chunked"],
)
def test_our_driver_call_equals_that_of_tritons_launcher(driver, monkeypatch, make):
    from triton.backends.nvidia.driver import include_dirs, make_launcher
    from triton.runtime.build import compile_module_from_src

    library, folder = driver
    x = make()
    extension = compile_extension()
    kernels = bound_kernels(monkeypatch, x, torch.empty(x.shape[-1]))
    assert len(kernels) == 3
    for compiled, grid, tensors, numbers, constants, dependent in kernels:
        inputs = [tensor for tensor in tensors if tensor is not None]
        rest = (*tensors[len(inputs) :], *numbers)
        kinds = list(compiled.src.signature.values())
        sizes = [8 if k.startswith("*") else SIZES[k] for k in kinds if k != "constexpr"] + [8, 8]
        library.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

        source = make_launcher(dict(compiled.src.constants), compiled.src.signature, None)
        module = compile_module_from_src(
            source, "__triton_launcher", [str(folder)], include_dirs, ["libcuda.so.1"]
        )
        pointers = [tensor.data_ptr() for tensor in inputs]
        flags = (False, dependent, None, None, compiled.packed_metadata, None, None, None)
        module.launch(
            grid, 1, 1, STREAM, FUNCTION, *flags, *pointers, *rest, *constants.values()
        )  # fmt: skip
        expected = recorded(library)

        loaded = SimpleNamespace(
            function=FUNCTION,
            packed_metadata=compiled.packed_metadata,
            metadata=compiled.metadata,
            src=compiled.src,
            run=SimpleNamespace(global_scratch_size=0, profile_scratch_size=0),
        )
        open_ = (*[None] * len(inputs), *rest)
        fixed = (*pointers[:1], *[None] * (len(inputs) - 1), *rest)  # the first by its address
        for values, which in ((open_, range(len(inputs))), (fixed, range(1, len(inputs)))):
            handle = handle_of(loaded, values, grid, 0, dependent)
            run = extension.Sequence(
                len(inputs), None, (), (handle.as_tuple(tuple(which)),), (0,),
                torch.Tensor.data_ptr, lambda: 0, lambda index: STREAM, 0, None,
                ctypes.cast(library.cuLaunchKernelEx, ctypes.c_void_p).value,
            )  # fmt: skip
            library.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
            assert run(*inputs) is inputs[0]
            assert recorded(library) == expected
            assert len(expected) > 64


def test_a_kernel_that_needs_another_launch_has_no_handle():
    src = SimpleNamespace(signature={"x": "*fp32", "n": "i32"})
    usual = SimpleNamespace(
        function=1,
        packed_metadata=(4, 1, 0),
        metadata=SimpleNamespace(launch_cooperative_grid=False),
        src=src,
        run=SimpleNamespace(global_scratch_size=0, profile_scratch_size=0),
    )
    assert handle_of(usual, (None, 5), 3, 0) is not None
    for change in (
        {"packed_metadata": (4, 2, 0)},
        {"metadata": SimpleNamespace(launch_cooperative_grid=True)},
        {"run": SimpleNamespace(global_scratch_size=16, profile_scratch_size=0)},
        {"run": SimpleNamespace(global_scratch_size=0, profile_scratch_size=16)},
        {"src": SimpleNamespace(signature={"x": "*fp32", "n": "nvTmaDesc"})},
    ):
        assert handle_of(SimpleNamespace(**(vars(usual) | change)), (None, 5), 3, 0) is None
