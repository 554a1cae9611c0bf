"""The CPU engine. What it can run is told here, without importing it."""

from __future__ import annotations

import os
import sys
from importlib import util

DTYPES = ("float32", "bfloat16")


def why_not() -> str | None:
    """Why this engine cannot run here; None where it can."""
    if sys.platform == "win32":
        return "it is not made for Windows yet"
    for package in ("numba", "llvmlite"):
        if util.find_spec(package) is None:
            return f"the package {package} is not installed"
    return None


def usable_cores() -> int:
    """Cores that this process may use, which a container can narrow."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
