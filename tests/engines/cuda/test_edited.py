"""A tile that was edited is compiled again, in another process that shares Triton's store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import onelaunch

ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import json
import torch
from triton.runtime import driver
from onelaunch.config import preset
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape
from tests.compiling import absent

driver._active = absent("sm_90")
config = preset("stories260k").with_(n_layers=1)
weights = {name: torch.zeros(shape) for name, shape in config.weight_shapes().items()}
packed = pack(config, weights, torch.bfloat16, torch.device("cpu"))
shape = Shape(1, 16, part="ffn")
calls = [form(config, packed, shape, {}).calls[0] for form in (BoundForward, FusedForward)]
print(json.dumps([call.compile().asm["ptx"] for call in calls]))
"""


def compiled(source: Path, store: Path) -> list[str]:
    """The code of embed alone, and of one launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{source}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(store),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cubins(store: Path) -> int:
    return len(list(store.glob("*/*.cubin")))


def test_an_edited_tile_is_compiled_again(tmp_path):
    pytest.importorskip("triton")
    source, store = tmp_path / "src", tmp_path / "store"
    package = Path(onelaunch.__file__).parent
    shutil.copytree(
        package, source / "onelaunch", ignore=shutil.ignore_patterns("__pycache__", "bench")
    )
    before = compiled(source, store)
    assert cubins(store) == len(before) == 2
    assert compiled(source, store) == before
    assert cubins(store) == 2  # found, not compiled

    tile = source / "onelaunch" / "engines" / "cuda" / "stages" / "embed.py"
    text = tile.read_text(encoding="utf-8")
    assert text.count('float("nan")') == 1
    tile.write_text(text.replace('float("nan")', 'float("inf")'), encoding="utf-8")
    after = compiled(source, store)
    assert cubins(store) == 4
    assert all(old != new for old, new in zip(before, after, strict=True))
