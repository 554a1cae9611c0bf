"""The compiler of training's programs without its child, whose imports take seconds."""

from __future__ import annotations

from safetensors.torch import load_file

from onelaunch.engines.coreml import compiler


class InProcess:
    """In the compiler's place."""

    def __init__(self, shape, store=None):
        self.shape, self.store = shape, store

    def compile(self, weights, folder):
        return compiler.compile_set(self.shape, load_file(weights), folder, self.store)

    def close(self):
        pass
