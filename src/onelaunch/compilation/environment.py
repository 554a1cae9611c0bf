"""The environment of child processes, so that they import the same modules."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
"""The folder that contains this package."""


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with `more`, and its module search path as PYTHONPATH.

    sys.path may have been changed by code that a child does not run, and `python -m` would put the
    current folder first in a child.
    """
    paths = []
    for entry in sys.path:
        with suppress(OSError, TypeError):  # a removed folder; not a path
            paths.append(os.path.abspath(entry))
    if _ROOT not in map(os.path.realpath, paths):
        paths.insert(0, _ROOT)
    search_path = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
    return os.environ | search_path | more
