"""The Core ML engine: models as ML Programs. `why_not` checks for it without importing it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from importlib import metadata
from types import ModuleType
from typing import ParamSpec, TypeVar

from onelaunch.errors import BadInput, MissingExtra

__all__ = ["DTYPES", "KNOWN_VERSIONS", "coremltools", "one_at_a_time", "why_not"]

DTYPES = ("float16", "float32")
"""What programs are evaluated in."""

KNOWN_VERSIONS = ("9.0",)
"""Of coremltools: those that programs were built and read with."""


def why_not() -> str | None:
    """Why programs cannot be built here; None where they can."""
    try:
        version = metadata.version("coremltools")
    except metadata.PackageNotFoundError:
        return "the package coremltools is not installed"
    if not any(version == known or version.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        return f"coremltools {version} is not known here; {' or '.join(KNOWN_VERSIONS)} is"
    return None


def coremltools(purpose: str) -> ModuleType:
    """The package, without its remarks about what this system or this PyTorch has not and without
    its progress bars. Raises MissingExtra, and BadInput for a version that is not known."""
    if (reason := why_not()) is not None:
        if "not installed" in reason:
            raise MissingExtra("coremltools", "coreml", purpose)
        raise BadInput(f"{purpose}: {reason}; pip install 'onelaunch[coreml]'")
    import logging

    log = logging.getLogger("coremltools")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        import coremltools
    finally:
        log.setLevel(before)
    log.setLevel(max(before, logging.ERROR))
    from coremltools.converters.mil.mil.passes import pass_pipeline

    pass_pipeline.tqdm = lambda passes, **_: passes
    return coremltools


P = ParamSpec("P")
T = TypeVar("T")
_building = threading.RLock()


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Run one at a time: coremltools has one open block for all threads."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _building:
            return function(*args, **kwargs)

    return alone
