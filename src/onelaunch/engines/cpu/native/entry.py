"""The entry point of the compiled program."""

from __future__ import annotations

from onelaunch.engines.cpu.layout import Operation, Product, Seq, State
from onelaunch.engines.cpu.native.generate import advance, generate, reset_governor
from onelaunch.engines.cpu.native.kernels import TILE, WIDTH, product, row_bytes
from onelaunch.engines.cpu.native.sampling import sample
from onelaunch.engines.cpu.native.stages import help_out, run
from onelaunch.engines.cpu.native.vectors import LANES, add, compiled, field, load, splat, sum_lanes


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
        seq = field(state, State.SEQUENCES) + 8 * Seq.LENGTH * a
        sample(state, seq)
        return field(seq, Seq.NEXT)
    if operation == Operation.RESET:
        reset_governor(state)
        return 0
    if operation == Operation.READ:
        return read(state, b)
    if operation == Operation.PRODUCT:
        return products(state, a, b)
    return LANES if a == 0 else TILE


@compiled
def products(state, table, count):
    """See `Product`; 0."""
    rows, columns = field(table, Product.ROWS), field(table, Product.COLUMNS)
    x, out = field(table, Product.X), field(table, Product.OUT)
    weights = field(table, Product.WEIGHTS)
    for _ in range(count):
        product(state, weights, 0, rows, columns, x, 0, 1, out)
        weights += rows * row_bytes(state, columns)
    return 0


@compiled
def read(address, size):
    """Add up `size` bytes of floats, whole blocks of eight vectors: what a thread reads at best."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(0.0)
    for i in range(address, address + size // (8 * WIDTH) * (8 * WIDTH), 8 * WIDTH):
        a0 = add(a0, load(i))
        a1 = add(a1, load(i + WIDTH))
        a2 = add(a2, load(i + 2 * WIDTH))
        a3 = add(a3, load(i + 3 * WIDTH))
        a4 = add(a4, load(i + 4 * WIDTH))
        a5 = add(a5, load(i + 5 * WIDTH))
        a6 = add(a6, load(i + 6 * WIDTH))
        a7 = add(a7, load(i + 7 * WIDTH))
    total = add(add(add(a0, a1), add(a2, a3)), add(add(a4, a5), add(a6, a7)))
    # used, lest the compiler leaves the reading out
    return 1 if sum_lanes(total) == 0.125 else 0
