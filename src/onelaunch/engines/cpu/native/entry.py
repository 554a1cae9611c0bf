"""The one function that the compiled program offers."""

from __future__ import annotations

from onelaunch.engines.cpu.layout import Operation, State, Text
from onelaunch.engines.cpu.native.generate import advance, generate, reset_governor
from onelaunch.engines.cpu.native.kernels import compiled, field
from onelaunch.engines.cpu.native.sampling import sample
from onelaunch.engines.cpu.native.stages import help_out, run
from onelaunch.engines.cpu.native.vectors import LANES


@compiled
def entry(operation, state, a, b):
    """See `Operation`."""
    if operation == Operation.RUN:
        return run(state, a, b)
    if operation == Operation.ADVANCE:
        return advance(state)
    if operation == Operation.GENERATE:
        return generate(state)
    if operation == Operation.HELP:
        return help_out(state, a, b)
    if operation == Operation.SAMPLE:
        text = field(state, State.TEXTS) + 8 * Text.LENGTH * a
        sample(state, text)
        return field(text, Text.NEXT)
    if operation == Operation.RESET:
        reset_governor(state)
        return 0
    return LANES
