"""The parts of a micro-step through ML Programs, by which it is timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Clock = Callable[[str], AbstractContextManager[None]]
"""Returns a context in which a part of a micro-step, one of PARTS or PRODUCTS, is done. Those of
PARTS may be within one another; PRODUCTS are another thread's."""
PROGRAMS_WAIT, FORWARD, LOSS, CLASSIFIER = "programs wait", "forward", "loss", "classifier"
CLASSIFIER_BACKWARD, BACKWARD, SUMS = "classifier backward", "backward", "sums"
PRODUCTS_WAIT, PRODUCTS = "products wait", "products"
PARTS = (
    PROGRAMS_WAIT, FORWARD, LOSS, CLASSIFIER, CLASSIFIER_BACKWARD, BACKWARD, SUMS, PRODUCTS_WAIT,
)  # fmt: skip


def no_clock(part: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return _NO_CONTEXT


_NO_CONTEXT = nullcontext()
