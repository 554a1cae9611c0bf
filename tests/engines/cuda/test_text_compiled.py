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
from onelaunch.engines.cuda.decoding import text
from onelaunch.errors import RunFailed

pytest.importorskip("cuda.bindings.nvrtc")

NAMES = ("stories260k", "stories15m", "stories110m", "smollm2-135m", "qwen3-0.6b", "llama-3.2-1b")


def compiled(name, dtype, grid, draws=False):
    macros = text.macros(preset(name), dtype, grid, H200.shared_bytes, draws)
    assert macros["SLOTS"] >= text.MIN_SLOTS
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
    grid = text.grid_for(preset(name), torch.bfloat16, 1, 132)
    assert stack_bytes(compiled(name, torch.bfloat16, grid), tmp_path) <= 128


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "max_batch"),
    [*((name, n) for name in NAMES[:4] for n in (8, 64)), ("qwen3-0.6b", 8)],
)
def test_several_texts_stay_in_registers(name, max_batch, dtype, tmp_path):
    grid = text.grid_for(preset(name), dtype, max_batch, 132)
    most = 224 if name == "qwen3-0.6b" else 64
    assert stack_bytes(compiled(name, dtype, grid), tmp_path) <= most


@pytest.mark.extended
@pytest.mark.parametrize(
    ("dtype", "tiles"), [(torch.float16, True), (torch.float16, False), (torch.float32, False)]
)
@pytest.mark.parametrize("ctas", [1, 78, 132])
def test_every_dtype_and_any_number_of_multiprocessors_compile(dtype, tiles, ctas):
    assert compiled("stories260k", dtype, text.Grid(1, ctas, tiles=tiles))


def test_what_does_not_compile_is_said():
    with pytest.raises(RunFailed, match="error"):
        nvrtc.compiled("this is no C++", {}, "sm_90a")
