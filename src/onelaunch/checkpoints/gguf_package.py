"""The optional package gguf, of llama.cpp: its quantization and its writer."""

from __future__ import annotations

from typing import Any

from onelaunch.errors import MissingExtra


def gguf_package(purpose: str) -> Any:
    """Import the package gguf; raises MissingExtra."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise MissingExtra("gguf", "gguf", purpose) from None
    return gguf
