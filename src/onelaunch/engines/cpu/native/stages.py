"""Stages as items of work, and the walk of several threads through them.

Each stage is one or two phases, each phase a number of items that may be done in any order. Every
thread has a share of each phase's items, the same in every forward, so that its part of the
weights stays in the cache nearest to it; who is done with his own takes from the others. A phase
begins when every item of the one before is finished. A thread that is late, or was put aside by
the system, delays no other unless it is at an item; one alone gets through too. What an item
computes does not depend on who does it: results are the same with any number of threads.
"""

from __future__ import annotations

from onelaunch.engines.cpu.layout import Group, Layer, Seq, State, Status, Sync, Token
from onelaunch.engines.cpu.native import kernels
from onelaunch.engines.cpu.native.kernels import TILE, padded, row_bytes
from onelaunch.engines.cpu.native.sampling import sample
from onelaunch.engines.cpu.native.vectors import (
    atomic_add,
    atomic_get,
    atomic_put,
    call2,
    compare_and_swap,
    compiled,
    field,
    get_i64,
    pause,
    put_i64,
)

# the order of plan.kinds.KINDS
EMBED, QKV, ATTENTION, OUT_PROJ, GATE_UP, DOWN, HEAD, SAMPLE = range(8)
ITEM_BYTES = 1 << 20  # of weights, at most
ITEMS_PER_THREAD = 4
MANY_TOKENS = 4
ROWS_OF_MANY = 64
TOKENS_PER_ITEM = 8
CLOSED = (1 << 32) - 1  # beyond every phase
SLEEP = 20  # microseconds
MOST_SLEEPS = 800_000  # about a minute: one takes some 70 microseconds
EPOCH_BITS = (1 << 31) - 1


@compiled
def _over(n, size):
    return (n + size - 1) // size


@compiled
def _item_rows(state, rows, columns):
    """Rows of an item. The end of one costs a thread some reading, so it is as large as leaves
    several for each thread; of many tokens, what stays in the nearest cache."""
    limit = field(state, State.MAX_ROWS)
    if field(state, State.N_TOKENS) >= MANY_TOKENS:
        limit = min(limit, ROWS_OF_MANY)
    limit = min(limit, ITEM_BYTES // row_bytes(state, columns))
    threads = get_i64(field(state, State.SYNC) + 8 * Sync.ACTIVE)
    if threads > 1:
        limit = min(limit, rows // (ITEMS_PER_THREAD * threads))
    return max(TILE, limit // TILE * TILE)


@compiled
def _item_heads(state):
    size = field(state, State.HEAD_DIM)
    heads = field(state, State.HEADS) + 2 * field(state, State.KV_HEADS)
    return max(1, _item_rows(state, heads * size, field(state, State.DIM)) // size)


@compiled
def _half_rows(state):
    """Rows of gate in an item; as many of up come with them."""
    rows = _item_rows(state, 2 * field(state, State.HIDDEN), field(state, State.DIM))
    return max(TILE, rows // 2 // TILE * TILE)


@compiled
def count_items(state, kind, phase):
    """Items of a stage's phase; phase 0 is the norm where a stage has one."""
    tokens = field(state, State.N_TOKENS)
    dim = field(state, State.DIM)
    if phase == 0:
        if kind == EMBED or (kind in (QKV, GATE_UP, HEAD) and tokens > 1):
            return _over(tokens, TOKENS_PER_ITEM)
        return 0
    if kind == QKV:
        heads = field(state, State.HEADS) + 2 * field(state, State.KV_HEADS)
        return _over(heads, _item_heads(state))
    if kind == ATTENTION:
        return field(state, State.N_GROUPS) * field(state, State.HEADS)
    if kind == OUT_PROJ:
        width = field(state, State.HEADS) * field(state, State.HEAD_DIM)
        return _over(dim, _item_rows(state, dim, width))
    if kind == GATE_UP:
        return _over(field(state, State.HIDDEN), _half_rows(state))
    if kind == DOWN:
        return _over(dim, _item_rows(state, dim, field(state, State.HIDDEN)))
    if kind == HEAD:
        if field(state, State.N_ROWS) == 0:
            return 0
        return _over(field(state, State.VOCAB), _item_rows(state, field(state, State.VOCAB), dim))
    if kind == SAMPLE:
        return field(state, State.N_SEQUENCES)
    return 0


@compiled
def _norm_weight(state, kind, layer):
    if kind == HEAD:
        return field(state, State.FINAL_NORM)
    return kernels.layer_field(state, layer, Layer.INPUT_NORM if kind == QKV else Layer.POST_NORM)


@compiled
def _prepare(state, kind, layer, item):
    """Phase 0: the embedding, or the norm of some tokens."""
    first = item * TOKENS_PER_ITEM
    row = 4 * padded(field(state, State.DIM))
    normed = field(state, State.NORMED)
    for t in range(first, min(first + TOKENS_PER_ITEM, field(state, State.N_TOKENS))):
        if kind == EMBED:
            kernels.embed(state, t)
        elif kind == HEAD:
            to = kernels.token_field(state, t, Token.LOGITS)
            if to >= 0:
                kernels.normalize(state, t, field(state, State.FINAL_NORM), normed + row * to)
        else:
            kernels.normalize(state, t, _norm_weight(state, kind, layer), normed + row * t)


@compiled
def _product(state, kind, layer, item, stamp, scratch):
    """A product behind a norm. Of one token every thread makes the norm itself, once a stage: that
    is less than waiting for somebody else's."""
    row = 4 * padded(field(state, State.DIM))
    x = field(state, State.NORMED)
    tokens = field(state, State.N_TOKENS)
    out = scratch + 64 + row
    if tokens == 1:
        x = scratch + 64
        if get_i64(scratch) != stamp:
            kernels.normalize(state, 0, _norm_weight(state, kind, layer), x)
            put_i64(scratch, stamp)
    if kind == QKV:
        heads = field(state, State.HEADS) + 2 * field(state, State.KV_HEADS)
        size = _item_heads(state)
        first = item * size
        kernels.qkv(state, layer, first, min(size, heads - first), x, row, out)
    elif kind == GATE_UP:
        size = _half_rows(state)
        first = item * size
        rows = min(size, field(state, State.HIDDEN) - first)
        kernels.gate_up(state, layer, first, rows, x, row, out)
    else:
        size = _item_rows(state, field(state, State.VOCAB), field(state, State.DIM))
        first = item * size
        rows = min(size, field(state, State.VOCAB) - first)
        kernels.head(state, first, rows, x, row, field(state, State.N_ROWS), out)


@compiled
def do_item(state, kind, layer, phase, item, stamp, thread):
    """One item of work."""
    scratch = field(state, State.SCRATCH) + field(state, State.SCRATCH_SIZE) * thread
    dim = field(state, State.DIM)
    if phase == 0:
        _prepare(state, kind, layer, item)
    elif kind == ATTENTION:
        heads = field(state, State.HEADS)
        group = field(state, State.GROUPS) + 8 * Group.LENGTH * (item // heads)
        first, count = field(group, Group.FIRST), field(group, Group.COUNT)
        out = 4 * padded(dim) + field(state, State.OUT_ROW) * field(state, State.MAX_TOKENS)
        kernels.attend(state, layer, first, count, item % heads, scratch + 64 + out)
    elif kind in (OUT_PROJ, DOWN):
        if kind == OUT_PROJ:
            columns = field(state, State.HEADS) * field(state, State.HEAD_DIM)
            weights = kernels.layer_field(state, layer, Layer.O_PROJ)
            x = field(state, State.ATTN_OUT)
        else:
            columns = field(state, State.HIDDEN)
            weights = kernels.layer_field(state, layer, Layer.DOWN)
            x = field(state, State.ACTIVATION)
        size = _item_rows(state, dim, columns)
        first = item * size
        rows = min(size, dim - first)
        out = scratch + 64 + 4 * padded(dim)
        kernels.add_product(state, weights, first, rows, columns, x, out)
    elif kind == SAMPLE:
        seq = field(state, State.SEQUENCES) + 8 * Seq.LENGTH * item
        if field(seq, Seq.ROW) >= 0:
            sample(state, seq)
    else:
        _product(state, kind, layer, item, stamp, scratch)


@compiled
def alone(state):
    """The call's stages by one thread."""
    stages = field(state, State.STAGES)
    for s in range(field(state, State.FIRST_STAGE), field(state, State.LAST_STAGE)):
        kind, layer = get_i64(stages + 16 * s), get_i64(stages + 16 * s + 8)
        stamp = field(state, State.STAMP) + 1
        put_i64(state + 8 * State.STAMP, stamp)
        for phase in range(2):
            for item in range(count_items(state, kind, phase)):
                do_item(state, kind, layer, phase, item, -stamp, 0)


@compiled
def _tag(epoch):
    return (epoch & EPOCH_BITS) << 32


@compiled
def _take(ticket, epoch, phase, count):
    """The next of a share's `count` items of a phase; -1 where none is left.

    A ticket is the epoch's low bits << 32 | phase << 16 | items taken of it. It can be changed only
    in its own epoch: who took an item knows that the call is not over, and whose tables
    these are.
    """
    while True:
        seen = atomic_get(ticket)
        at = (seen >> 16) & 0xFFFF
        if seen >> 32 != epoch & EPOCH_BITS or at > phase:
            return -1
        taken = seen & 0xFFFF if at == phase else 0
        if taken >= count:
            return -1
        if compare_and_swap(ticket, seen, _tag(epoch) + (phase << 16) + taken + 1):
            return taken


@compiled
def _await(state, epoch, least):
    """Until `least` items of this call are finished: spin, then sleep. False where the call is
    over, or after a minute."""
    sync = field(state, State.SYNC)
    spins = field(state, State.SPIN)
    n = 0
    while atomic_get(sync + 8 * Sync.FINISHED) < least:
        n += 1
        if n <= spins:
            pause()
        else:
            call2(field(state, State.SLEEP), SLEEP, 0)
            if n > spins + MOST_SLEEPS:
                return False
        if atomic_get(sync + 8 * Sync.EPOCH) != epoch:
            return False
    return True


@compiled
def walk(state, epoch, thread):
    """Take part in the call numbered `epoch`; false where it could not be seen to its end.

    Only while an item is held may the tables be trusted: without one, the call may be over.
    """
    sync = field(state, State.SYNC)
    stages = field(state, State.STAGES)
    threads = get_i64(sync + 8 * Sync.ACTIVE)
    total, number = 0, 0
    for s in range(field(state, State.FIRST_STAGE), field(state, State.LAST_STAGE)):
        kind, layer = get_i64(stages + 16 * s), get_i64(stages + 16 * s + 8)
        for phase in range(2):
            count = count_items(state, kind, phase)
            number += 1
            if count == 0:
                continue
            for i in range(threads):
                owner = (thread + i) % threads
                first = count * owner // threads
                share = count * (owner + 1) // threads - first
                ticket = sync + 8 * (Sync.TICKETS + Sync.APART * owner)
                item = _take(ticket, epoch, number, share)
                while item >= 0:
                    stamp = (epoch << 12) + s
                    do_item(state, kind, layer, phase, first + item, stamp, thread)
                    atomic_add(sync + 8 * Sync.FINISHED, 1)
                    item = _take(ticket, epoch, number, share)
            total += count
            if not _await(state, epoch, total):
                if thread == 0:
                    put_i64(state + 8 * State.STATUS_AT, s)
                return False
    return True


@compiled
def _set_prefetch(state, source):
    put_i64(state + 8 * State.PREFETCH_TO, field(state, source))
    put_i64(state + 8 * State.PREFETCH_AHEAD, field(state, source + 1))


@compiled
def run(state, first, last):
    """Stages first .. last of the forward that the tables describe; a Status."""
    put_i64(state + 8 * State.FIRST_STAGE, first)
    put_i64(state + 8 * State.LAST_STAGE, last)
    sync = field(state, State.SYNC)
    threads = get_i64(sync + 8 * Sync.ACTIVE)
    _set_prefetch(state, State.ONE_PREFETCH_TO if threads <= 1 else State.SEVERAL_PREFETCH_TO)
    if threads <= 1:
        alone(state)
        return Status.OK
    epoch = get_i64(sync + 8 * Sync.EPOCH) + 1
    put_i64(sync + 8 * Sync.FINISHED, 0)
    for i in range(threads):
        atomic_put(sync + 8 * (Sync.TICKETS + Sync.APART * i), _tag(epoch))
    atomic_put(sync + 8 * Sync.EPOCH, epoch)
    if not walk(state, epoch, 0):
        return Status.TIMEOUT
    for i in range(threads):
        atomic_put(sync + 8 * (Sync.TICKETS + Sync.APART * i), _tag(epoch) + CLOSED)
    return Status.OK


@compiled
def help_out(state, thread, idle):
    """A helper's life: take part in every call, until it had nothing to do for `idle` microseconds
    or the engine closes."""
    sync = field(state, State.SYNC)
    spins = field(state, State.SPIN)
    seen, waited, slept = 0, 0, 0
    while atomic_get(sync + 8 * Sync.CLOSING) == 0:
        epoch = atomic_get(sync + 8 * Sync.EPOCH)
        active = atomic_get(sync + 8 * Sync.ACTIVE) > thread
        if epoch != seen and active:
            walk(state, epoch, thread)
            seen, waited, slept = epoch, 0, 0
        elif waited < spins and active:
            waited += 1
            pause()
        elif slept < idle or atomic_get(sync + 8 * Sync.BUSY):
            nap = min(50 + slept // 4, 1000)
            call2(field(state, State.SLEEP), nap, 0)
            slept += nap
        else:
            break
    return Status.OK
