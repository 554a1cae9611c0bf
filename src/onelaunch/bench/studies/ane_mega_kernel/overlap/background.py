"""What overlap has running in the background: compilations of ML Programs, or of a GPU's kernels,
in child processes of low priority, as training and the CUDA engine have them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.compiler import Compiler, Shape
from onelaunch.errors import RunFailed

TRITON_STORE = "TRITON_CACHE_DIR"
PATIENCE_SECONDS = 300.0


class ProgramCompilations:
    """Of a model's forward and backward, two compilations at once."""

    name = "ML Programs"
    each = 2
    refused = 0

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], sequence: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._weights = Path(self._folder.name) / "weights.safetensors"
        save_file(weights, self._weights)
        self._compiler = Compiler(Shape(config, 1, sequence, config.n_layers, "full"))

    def compile(self) -> None:
        """Both, waited for."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        self._compiler.compile(self._weights, folder)
        shutil.rmtree(folder)

    def close(self) -> None:
        """End the child."""
        self._compiler.close()
        self._folder.cleanup()


class KernelCompilations:
    """Of the CUDA engine's kernel for gate and up, in one tiling after the other."""

    name = "Triton kernels"
    each = 1

    def __init__(self, config: ModelConfig, sequence: int, device: Any) -> None:
        from onelaunch.engines.cuda.blocking import default
        from onelaunch.engines.cuda.choice import STAGED
        from onelaunch.engines.cuda.compilers import Compilers, Job, Subject
        from onelaunch.engines.cuda.program import limits_of

        self.refused = 0
        self._before = os.environ.get(TRITON_STORE)
        self._folder = tempfile.TemporaryDirectory()
        os.environ[TRITON_STORE] = self._folder.name
        blockings = default(config, sequence, 2, limits_of(device))
        tiles = [
            replace(blockings["gate_up"], inner=inner, loads=loads, warps=warps)
            for inner, loads, warps in product((32, 64, 128), (2, 3, 4, 5), (2, 4, 8))
        ]
        self._jobs = [Job(sequence, STAGED, {**blockings, "gate_up": t}, "gate_up") for t in tiles]
        self._compilers = Compilers(Subject(config, "bfloat16", device.index or 0), 1)

    def compile(self) -> None:
        """The next one, waited for; one that does not fit this GPU is counted in `refused`."""
        if not self._jobs:
            raise RunFailed("every tiling was compiled: another would be found, not compiled")
        deadline = time.monotonic() + PATIENCE_SECONDS
        (answer,) = self._compilers.compile([self._jobs.pop()], deadline)
        self.refused += answer is not None

    def close(self) -> None:
        """End the child; the store of kernels is again the one that was."""
        self._compilers.close()
        del os.environ[TRITON_STORE]
        if self._before is not None:
            os.environ[TRITON_STORE] = self._before
        self._folder.cleanup()


Background = ProgramCompilations | KernelCompilations
