"""The kernel of a whole text compiled, without a GPU, for sm_90: it fits into shared memory and
registers. Nothing runs, so nothing else is claimed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.blocking import H200
from onelaunch.engines.cuda.decoding import grids, text
from onelaunch.errors import RunFailed

pytest.importorskip("cuda.bindings.nvrtc")

FEW_BYTES = 16
"""Of stack: a number or two that a token needs once. What a layer needs would be read from the L2,
as shared memory leaves the L1 no room."""
NAMES = ("stories260k", "stories15m", "stories110m", "smollm2-135m", "qwen3-0.6b", "llama-3.2-1b")


def compiled(name, dtype, grid, draws=False):
    macros = text.macros(preset(name), dtype, grid, H200.shared_bytes, draws)
    assert macros["SLOTS"] >= grids.MIN_SLOTS
    return nvrtc.compiled(text.source(grid.tiles), macros, "sm_90a")


def stack_bytes(code, tmp_path):
    triton = pytest.importorskip("triton")
    path = tmp_path / "text.cubin"
    path.write_bytes(code)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(listing.stdout.split("STACK:")[1].split()[0])


@pytest.mark.extended
@pytest.mark.parametrize("name", NAMES)
def test_a_text_stays_in_registers(name, tmp_path):
    grid = grids.grid_for(preset(name), torch.bfloat16, 1, 132)
    assert stack_bytes(compiled(name, torch.bfloat16, grid), tmp_path) <= FEW_BYTES


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "max_batch"),
    [*((name, n) for name in NAMES[:4] for n in (8, 64)), *((name, 8) for name in NAMES[4:])],
)
def test_several_texts_stay_in_registers(name, max_batch, dtype, tmp_path):
    grid = grids.grid_for(preset(name), dtype, max_batch, 132)
    assert stack_bytes(compiled(name, dtype, grid), tmp_path) <= FEW_BYTES


@pytest.mark.extended
@pytest.mark.parametrize(
    ("dtype", "tiles"), [(torch.float16, True), (torch.float16, False), (torch.float32, False)]
)
@pytest.mark.parametrize("ctas", [1, 78, 132])
def test_every_dtype_and_any_number_of_multiprocessors_compile(dtype, tiles, ctas):
    assert compiled("stories260k", dtype, grids.Grid(1, ctas, tiles=tiles))


def test_what_does_not_compile_is_said():
    with pytest.raises(RunFailed, match="error"):
        nvrtc.compiled("this is no C++", {}, "sm_90a")
