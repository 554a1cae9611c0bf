"""The training step's entry point: threads that take items of one phase after another."""

from __future__ import annotations

from onelaunch.engines.cpu.native.training import stages
from onelaunch.engines.cpu.native.training.gradients import (
    embedding_gradient,
    norm_gradient,
    weight_gradient,
)
from onelaunch.engines.cpu.native.training.rows import padded_row
from onelaunch.engines.cpu.native.vectors import (
    LANES,
    atomic_add,
    atomic_get,
    call2,
    compiled,
    field,
    get_i64,
    pause,
    put_i64,
)
from onelaunch.engines.cpu.training.layout import (
    APART,
    SPENT_FIELDS,
    Call,
    Kind,
    Operation,
    Phase,
    Step,
)

MONOTONIC = 1  # the clock
SPINS = 20_000
NAP = 20  # microseconds
MOST_NAPS = 8_000_000  # ten minutes and more: an item of a long context may take one


@compiled
def _do(step, operation, item, scratch):
    kind, arg = field(operation, Operation.KIND), field(operation, Operation.ARG)
    fresh = field(step, Step.FRESH) != 0 and field(operation, Operation.ALWAYS_ADDS) == 0
    if kind == Kind.FORWARD_ROWS:
        stages.forward_rows(step, arg, item, scratch)
    elif kind == Kind.FORWARD_ATTENTION:
        stages.forward_attention(step, arg, item, scratch)
    elif kind == Kind.LOSS:
        stages.loss(step, operation, item, scratch)
    elif kind == Kind.BACKWARD_ROWS:
        stages.backward_rows(step, arg, item, scratch)
    elif kind == Kind.BACKWARD_ATTENTION:
        stages.backward_attention(step, arg, item, scratch)
    elif kind == Kind.WEIGHT_GRADIENT:
        weight_gradient(
            field(operation, Operation.INPUT),
            field(operation, Operation.INPUTS),
            field(operation, Operation.RSTD),
            field(operation, Operation.NORM),
            field(operation, Operation.OUTPUT),
            field(operation, Operation.OUTPUTS),
            field(operation, Operation.OUTPUT_BLOCK),
            field(operation, Operation.N_BLOCKS),
            field(operation, Operation.ROWS),
            field(operation, Operation.GRADIENT),
            not fresh,
            item,
            scratch,
        )
    elif kind == Kind.EMBEDDING_GRADIENT:
        embedding_gradient(
            field(step, Step.DX),
            field(step, Step.DIM),
            field(step, Step.TOKENS),
            arg,
            field(step, Step.SEQUENCE_BLOCKS),
            field(step, Step.BLOCKS),
            field(operation, Operation.GRADIENT),
            item,
            scratch,
        )
    else:
        width = field(operation, Operation.INPUTS)
        norm_gradient(
            field(operation, Operation.INPUT),
            padded_row(width),
            width,
            field(step, Step.BLOCKS),
            field(operation, Operation.GRADIENT),
            not fresh,
        )


@compiled
def _await(step, counter, least):
    """Until so many items are done: spin, then sleep. False where it takes too long."""
    n = 0
    while atomic_get(counter) < least:
        n += 1
        if n <= SPINS:
            pause()
        else:
            call2(field(step, Step.SLEEP), NAP, 0)
            if n > SPINS + MOST_NAPS:
                return False
    return True


@compiled
def _now(step, to):
    """Nanoseconds; `to` is a timespec for the system to write."""
    call2(field(step, Step.CLOCK), MONOTONIC, to)
    return get_i64(to) * 1_000_000_000 + get_i64(to + 8)


@compiled
def _spend(spent, kind, nanoseconds):
    at = spent + 8 * kind
    put_i64(at, get_i64(at) + nanoseconds)


@compiled
def run(step, thread):
    """Take part in a step; how many of its phases were seen to their end."""
    scratch = field(step, Step.SCRATCH) + field(step, Step.SCRATCH_SIZE) * thread
    spent = field(step, Step.SPENT) + 8 * SPENT_FIELDS * thread
    clock = spent + 8 * (SPENT_FIELDS - 2)
    before = _now(step, clock)
    if thread == 0:
        put_i64(field(step, Step.TIMES), before)
    for p in range(field(step, Step.N_PHASES)):
        phase = field(step, Step.PHASES) + 8 * Phase.LENGTH * p
        counters = field(step, Step.COUNTERS) + 8 * 2 * APART * p
        items = field(phase, Phase.ITEMS)
        while True:
            item = atomic_add(counters, 1)
            if item >= items:
                break
            operation = field(step, Step.OPERATIONS)
            operation += 8 * Operation.LENGTH * field(phase, Phase.FIRST)
            while item >= field(operation, Operation.COUNT):
                item -= field(operation, Operation.COUNT)
                operation += 8 * Operation.LENGTH
            _do(step, operation, item, scratch)
            atomic_add(counters + 8 * APART, 1)
            now = _now(step, clock)
            _spend(spent, field(operation, Operation.KIND), now - before)
            before = now
        if not _await(step, counters + 8 * APART, items):
            put_i64(step + 8 * Step.STUCK_PHASE, p)
            return p
        now = _now(step, clock)
        _spend(spent, Kind.WAITING, now - before)
        before = now
        if thread == 0:
            put_i64(field(step, Step.TIMES) + 8 * (p + 1), now)
    return field(step, Step.N_PHASES)


@compiled
def entry(operation, step, a, b):
    """See `layout.Call`."""
    if operation == Call.RUN:
        return run(step, a)
    return LANES
