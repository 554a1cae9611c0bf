"""The CPU engine. `why_not` checks what it can run without importing it."""

from __future__ import annotations

import sys
from importlib import util

from onelaunch.compilation.child import usable_cores

__all__ = ["DTYPES", "usable_cores", "why_not"]

DTYPES = ("float32", "bfloat16")


def why_not() -> str | None:
    """Why this engine cannot run here; None where it can."""
    if sys.platform == "win32":
        return "it is not made for Windows yet"
    for package in ("numba", "llvmlite"):
        if util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return None
