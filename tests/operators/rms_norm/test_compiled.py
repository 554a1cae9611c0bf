"""The kernels compiled, without a GPU, for NVIDIA's sm_80, sm_90 and sm_100 and AMD's gfx942: they
compile at all and keep their tiles in registers. Nothing runs, so nothing else is claimed.

What is compiled is what `launch` binds for a shape, arguments and specialization included: only the
binding is replaced, by one that compiles for a device which is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from onelaunch.operators.rms_norm import launch
from onelaunch.operators.rms_norm.plan import FORWARD_MAX_TILE_COLUMNS, MAX_TILE_COLUMNS
from tests.compiling import absent, spilled

F32, BF16 = torch.float32, torch.bfloat16

# Bytes of registers that a thread may spill to memory: none, but for the 24 of one form on sm_90 (a
# float32 row of 1,024 columns on one warp; Triton 3.6) and the 8 of one on sm_100 (3.7).
MOST_SPILLED = {"sm_80": 0, "sm_90": 24, "sm_100": 8, "gfx942": 0}
# Two backward tiles fill the registers: the row of 16,384 columns on 16 warps (measured: up to 208
# bytes), and the published one of 16 rows of 512 columns on 4 warps (up to 248).
MOST_SPILLED_WIDEST = {"sm_80": 256, "sm_90": 256, "sm_100": 256, "gfx942": 0}
MOST_SPILLED_PUBLISHED = {"sm_80": 256, "sm_90": 256, "sm_100": 256, "gfx942": 0}

WIDTHS = (64, 96, 128, 256, 257, 512, 768, 1024, 2048, 4096, 8192, 16384, 20_000, 32768, 262_144)
SAMPLE = {
    "sm_80": (64, 768),
    "sm_90": (64, 257, 512, 4096, 16384, 20_000),
    "sm_100": (64, 768),
    "gfx942": (64, 768),
}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


def rows_of(columns: int) -> int:
    """Enough that the backward has several programs, and so partials to add. The tensors are
    allocated, but no page of them is touched."""
    return min(65536, 2**28 // columns)


@dataclass
class Compiled:
    """One kernel, and the bytes a thread of it spills."""

    name: str
    spilled: int


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """A function: the kernels that `launch` binds on a target for x, weight and settings."""
    triton = pytest.importorskip("triton")
    if launch.available(torch.device("cpu")):
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    done: list[Compiled] = []

    def bind(kernel, grid, tensors, numbers, constants, warps, dependent=False):
        options = {"num_warps": warps} | ({"launch_pdl": True} if dependent else {})
        compiled = kernel.warmup(*tensors, *numbers, grid=(1,), **constants, **options)
        done.append(Compiled(kernel.fn.__name__, spilled(triton, compiled, tmp_path)))
        return lambda *tensors: None

    def compile_for(target, x, weight, *, casting="llama", row_mode="auto", rule="tuned"):
        monkeypatch.setattr(driver, "_active", absent(target))
        monkeypatch.setattr(launch, "available", lambda device: True)
        monkeypatch.setattr(launch, "multiprocessors", lambda device: PROCESSORS[target])
        monkeypatch.setattr(
            launch, "dependent_launch", lambda device: target in ("sm_90", "sm_100")
        )
        monkeypatch.setattr(launch, "bind", bind)
        done.clear()
        settings = launch.Settings(1e-6, casting, 0.0, False, row_mode, rule)
        y = launch.forward(x, weight, settings)
        launch.backward(y, x, weight, settings, weight is not None)
        if weight is not None:
            launch.backward(y, x, weight, settings, False)
        return list(done)

    return compile_for


def limit(target: str, columns: int, rule: str) -> int:
    if MAX_TILE_COLUMNS // 2 < columns <= MAX_TILE_COLUMNS:
        return MOST_SPILLED_WIDEST[target]
    if rule == "source" and 256 < columns <= 512:
        return MOST_SPILLED_PUBLISHED[target]
    return MOST_SPILLED[target]


def check_forms(compile_for, target: str, columns: int, dtypes) -> None:
    """Every form that the plans use at one width: forward, backward with dW and without, the sum of
    the partials; by our rule, by one row a program, by the published rule."""
    for dtype in dtypes:
        x = torch.empty(rows_of(columns), columns, dtype=dtype)
        weight = torch.empty(columns, dtype=dtype)
        for row_mode, rule in (("auto", "tuned"), ("row", "tuned"), ("auto", "source")):
            kernels = compile_for(target, x, weight, row_mode=row_mode, rule=rule)
            names = [kernel.name for kernel in kernels]
            assert names.count("reduce_kernel") == 1, names
            assert len(names) == 4, names
            one_tile = MAX_TILE_COLUMNS if rule == "source" else FORWARD_MAX_TILE_COLUMNS
            assert ("chunked" in names[0]) == (columns > one_tile)
            for kernel in kernels:
                most = limit(target, columns, rule)
                label = f"{kernel.name}, {columns} columns, {dtype}, {row_mode}, {rule}, {target}"
                assert kernel.spilled <= most, f"{label}: a thread spills {kernel.spilled} bytes"


@pytest.mark.extended
@pytest.mark.parametrize(("target", "columns"), [(t, c) for t in SAMPLE for c in SAMPLE[t]])
def test_a_sample_of_the_forms_stays_in_registers(compile_for, target, columns):
    check_forms(compile_for, target, columns, (BF16,))


@pytest.mark.soak
@pytest.mark.parametrize("target", SAMPLE)
@pytest.mark.parametrize("columns", WIDTHS)
def test_every_form_stays_in_registers(compile_for, target, columns):
    check_forms(compile_for, target, columns, (BF16, F32))


@pytest.mark.soak
@pytest.mark.parametrize("target", SAMPLE)
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
@pytest.mark.parametrize("weight_dtype", [None, BF16, F32])
def test_every_meaning_stays_in_registers(compile_for, target, casting, weight_dtype):
    for dtype in (BF16, F32):
        x = torch.empty(rows_of(512), 512, dtype=dtype)
        weight = None if weight_dtype is None else torch.empty(512, dtype=weight_dtype)
        for kernel in compile_for(target, x, weight, casting=casting):
            assert kernel.spilled <= MOST_SPILLED[target]


@pytest.mark.extended
@pytest.mark.parametrize("target", SAMPLE)
def test_strided_rows_stay_in_registers(compile_for, target):
    """Queries of a packed projection, and rows of a wider tensor."""
    packed = torch.empty(8, 512, 3, 8, 64, dtype=BF16)[:, :, 0]
    padded = torch.empty(4096, 520, dtype=BF16)[:, :512]
    for x in (packed, padded):
        for kernel in compile_for(target, x, torch.empty(x.shape[-1], dtype=BF16)):
            assert kernel.spilled <= MOST_SPILLED[target]


def test_a_kernel_that_spills_is_noticed(compile_for):
    """The published tile at 512 columns is known to spill, so the measure must say so."""
    x, weight = torch.empty(rows_of(512), 512, dtype=BF16), torch.empty(512, dtype=BF16)
    kernels = compile_for("sm_90", x, weight, rule="source")
    assert max(kernel.spilled for kernel in kernels) > 0
