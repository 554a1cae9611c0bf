"""What overlap runs in the background: compilations of ML Programs, or of a GPU's kernels,
in a child process of low priority, as training has them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from onelaunch.compilation.children import Child
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.compiler import Compiler, Shape
from onelaunch.errors import RunFailed

TRITON_STORE = "TRITON_CACHE_DIR"
CHILD = "onelaunch.bench.studies.ane_mega_kernel.overlap.kernel_child"
TIMEOUT_SECONDS = 300.0


class ProgramCompilations:
    """Compilations of a model's forward and backward, two compilations at once."""

    name = "ML Programs"
    each = 2
    refused = 0

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], sequence: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._weights = Path(self._folder.name) / "weights.safetensors"
        save_file(weights, self._weights)
        self._compiler = Compiler(Shape(config, 1, sequence, config.n_layers, "full"))

    def compile(self) -> None:
        """Compile both, and wait."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        self._compiler.compile(self._weights, folder)
        shutil.rmtree(folder)

    def close(self) -> None:
        """End the child."""
        self._compiler.close()
        self._folder.cleanup()


class KernelCompilations:
    """Compilations of the CUDA engine's kernel for gate and up, in one tiling after the other."""

    name = "Triton kernels"
    each = 1

    def __init__(self, config: ModelConfig, sequence: int, device: Any) -> None:
        self.refused = 0
        self._before = os.environ.get(TRITON_STORE)
        self._folder = tempfile.TemporaryDirectory()
        os.environ[TRITON_STORE] = self._folder.name
        self._tiles = list(product((32, 64, 128), (2, 3, 4, 5), (2, 4, 8)))
        subject = json.dumps([config.to_dict(), sequence, device.index or 0])
        self._child = Child([sys.executable, "-m", CHILD, subject])

    def compile(self) -> None:
        """The next one, waited for; one that does not fit this GPU is counted in `refused`."""
        if not self._tiles:
            raise RunFailed("every tiling was compiled: a repeated one would be read, not compiled")
        self._child.send(json.dumps(self._tiles.pop()))
        answer = self._child.receive_within(TIMEOUT_SECONDS)
        if not answer:
            raise RunFailed(f"the compiler ended ({self._child.reason()})")
        self.refused += json.loads(answer) is not None

    def close(self) -> None:
        """End the child; restore the variable that names the store of kernels."""
        self._child.end()
        del os.environ[TRITON_STORE]
        if self._before is not None:
            os.environ[TRITON_STORE] = self._before
        self._folder.cleanup()


Background = ProgramCompilations | KernelCompilations
