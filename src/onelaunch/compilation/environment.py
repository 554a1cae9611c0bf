"""The environment of child processes: they find the modules that this process finds."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])
"""The folder that this package lies in."""


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with `more`, and with its module search path for a Python process
    that it starts. That may have come from the code that imported this package, which a child does
    not run, or from the folder it was started in, which `-m` puts first in a child."""
    paths = []
    for entry in sys.path:
        with suppress(OSError, TypeError):  # no folder any more; not a path
            paths.append(os.path.abspath(entry))
    if _ROOT not in map(os.path.realpath, paths):
        paths.insert(0, _ROOT)
    found = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONSAFEPATH": "1"}
    return os.environ | found | more
