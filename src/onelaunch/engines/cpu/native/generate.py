"""The generation loop: sequences grow by a token with each forward, until all are done."""

from __future__ import annotations

import numpy as np

from onelaunch.engines.cpu.layout import (
    QUERIES,
    End,
    Governor,
    Group,
    Seq,
    State,
    Status,
    Sync,
    Token,
)
from onelaunch.engines.cpu.native.sampling import NOT_FINITE
from onelaunch.engines.cpu.native.stages import run
from onelaunch.engines.cpu.native.vectors import (
    atomic_put,
    call2,
    compiled,
    field,
    get_f64,
    get_i32,
    get_i64,
    put_f64,
    put_i32,
    put_i64,
)

# Forwards with one number of threads. The first is not counted, and of the others not the slowest:
# one that the system interrupted would decide the search.
SEARCH_SAMPLES = 6
KEPT_WITHIN = 1.02  # the number in use stays unless another is faster by more
FIRST_PERIOD, LAST_PERIOD = 64, 1024
WORSE = 1.05


@compiled
def _set(table, index, value):
    put_i64(table + 8 * index, value)


@compiled
def _is_stop(seq, token):
    stops = field(seq, Seq.STOPS)
    for i in range(field(seq, Seq.N_STOPS)):  # noqa: SIM110 (no generators in Numba)
        if get_i64(stops + 8 * i) == token:
            return True
    return False


@compiled
def _append(state, seq):
    """Take what was drawn for a sequence."""
    token = field(seq, Seq.NEXT)
    _set(seq, Seq.ROW, -1)
    if token == NOT_FINITE:
        _set(seq, Seq.END, End.NOT_FINITE)
    elif _is_stop(seq, token):
        _set(seq, Seq.END, End.STOP)
    else:
        size = field(seq, Seq.SIZE) + 1
        put_i32(field(seq, Seq.IDS) + 4 * (size - 1), token)
        _set(seq, Seq.SIZE, size)
        if size >= field(seq, Seq.LIMIT):
            _set(seq, Seq.END, End.LIMIT)
        if size == field(seq, Seq.PROMPT) + 1:
            _set(state, State.NEWS, 1)
    if field(seq, Seq.END) != End.NONE:
        _set(state, State.NEWS, 1)


@compiled
def _lay_out(state, seq, index, n):
    """Put a sequence's unread tokens behind the n that the forward has; how many it then has."""
    read, size = field(seq, Seq.READ), field(seq, Seq.SIZE)
    count = min(size - read, field(state, State.MAX_TOKENS) - n)
    ids = field(seq, Seq.IDS)
    for i in range(count):
        token = field(state, State.TOKENS) + 8 * Token.LENGTH * (n + i)
        _set(token, Token.ID, get_i32(ids + 4 * (read + i)))
        _set(token, Token.SEQUENCE, index)
        _set(token, Token.POSITION, read + i)
        _set(token, Token.LOGITS, -1)
        if i % QUERIES == 0:
            groups = field(state, State.N_GROUPS)
            group = field(state, State.GROUPS) + 8 * Group.LENGTH * groups
            _set(group, Group.FIRST, n + i)
            _set(group, Group.COUNT, min(QUERIES, count - i))
            _set(state, State.N_GROUPS, groups + 1)
    _set(seq, Seq.READ, read + count)
    if count > 0 and read + count == size:
        row = field(state, State.N_ROWS)
        last = field(state, State.TOKENS) + 8 * Token.LENGTH * (n + count - 1)
        _set(last, Token.LOGITS, row)
        _set(seq, Seq.ROW, row)
        _set(state, State.N_ROWS, row + 1)
    return n + count


@compiled
def advance(state):
    """Take the drawn tokens and, unless there is news, lay out the next forward. Returns its number
    of tokens, 0 where there is none."""
    sequences = field(state, State.SEQUENCES)
    n_sequences = field(state, State.N_SEQUENCES)
    for i in range(n_sequences):
        seq = sequences + 8 * Seq.LENGTH * i
        if field(seq, Seq.ROW) >= 0:
            _append(state, seq)
    _set(state, State.N_GROUPS, 0)
    _set(state, State.N_ROWS, 0)
    n = 0
    if field(state, State.NEWS) == 0:
        for i in range(n_sequences):
            seq = sequences + 8 * Seq.LENGTH * i
            if field(seq, Seq.END) == End.NONE:
                n = _lay_out(state, seq, i, n)
    _set(state, State.N_TOKENS, n)
    return n


@compiled
def generate(state):
    """Advance and run until every sequence has ended, there is news, or the slice is over; a
    Status."""
    governor = field(state, State.GOVERNOR)
    began = _now(state)
    while True:
        n = advance(state)
        if n == 0:
            return Status.OK
        decoding = n <= field(state, State.N_SEQUENCES)
        if field(state, State.ADAPT) != 0:
            if decoding:
                _use(state, governor, field(governor, Governor.INDEX))
            else:  # many tokens are work for every thread
                atomic_put(field(state, State.SYNC) + 8 * Sync.ACTIVE, field(state, State.THREADS))
        before = _now(state)
        status = run(state, 0, field(state, State.ALL_STAGES))
        if status != Status.OK:
            return status
        after = _now(state)
        if decoding and field(state, State.ADAPT) != 0:
            govern(state, after - before)
        if after - began > np.float64(field(state, State.SLICE)):
            _set(state, State.NEWS, 1)


# ---- how many threads


@compiled
def _now(state):
    """Nanoseconds."""
    clock = field(state, State.CLOCK)
    to = state + 8 * State.STARTED
    call2(clock, 1, to)
    return np.float64(get_i64(to)) * 1e9 + np.float64(get_i64(to + 8))


@compiled
def _time(governor, index):
    return get_f64(governor + 8 * (Governor.TIMES + index))


@compiled
def _use(state, governor, index):
    """Let the index's number of threads work from now on."""
    _set(governor, Governor.INDEX, index)
    max_threads = field(state, State.THREADS)
    n = min(1 << index, max_threads)
    atomic_put(field(state, State.SYNC) + 8 * Sync.ACTIVE, n)


@compiled
def _try(state, governor, index):
    _set(governor, Governor.TRYING, index)
    _set(governor, Governor.SAMPLES, 0)
    put_f64(governor + 8 * Governor.SUM, 0.0)
    put_f64(governor + 8 * Governor.SLOWEST, 0.0)
    _use(state, governor, index)


@compiled
def govern(state, took):
    """Choose how many threads do the next forward, from what this one took (nanoseconds).

    The numbers 1, 2, 4 ... are tried in turn, then the best is kept; its running mean stays
    compared with what the others took, and its neighbours are tried again now and then, the less
    often the longer the answer stands.
    """
    governor = field(state, State.GOVERNOR)
    trying = field(governor, Governor.TRYING)
    if trying >= 0:
        samples = field(governor, Governor.SAMPLES) + 1
        _set(governor, Governor.SAMPLES, samples)
        if samples > 1:
            put_f64(governor + 8 * Governor.SUM, get_f64(governor + 8 * Governor.SUM) + took)
            slowest = governor + 8 * Governor.SLOWEST
            put_f64(slowest, max(get_f64(slowest), took))
        if samples < SEARCH_SAMPLES:
            return
        total = get_f64(governor + 8 * Governor.SUM) - get_f64(governor + 8 * Governor.SLOWEST)
        mean = total / (SEARCH_SAMPLES - 2)
        put_f64(governor + 8 * (Governor.TIMES + trying), mean)
        if trying < field(governor, Governor.FINAL):
            _try(state, governor, trying + 1)
            return
        _set(governor, Governor.TRYING, -1)
        _settle(state, governor)
        return
    index = field(governor, Governor.INDEX)
    at = governor + 8 * (Governor.TIMES + index)
    put_f64(at, get_f64(at) * 0.9 + took * 0.1)
    best = _best(governor, 0, field(governor, Governor.LAST))
    since = field(governor, Governor.SINCE) + 1
    _set(governor, Governor.SINCE, since)
    if _time(governor, best) * WORSE < _time(governor, index) and since >= 16:
        _set(governor, Governor.PERIOD, FIRST_PERIOD)
        _search(state, governor, index, best)
    elif since >= field(governor, Governor.PERIOD):
        _search(state, governor, index, index)


@compiled
def _search(state, governor, index, best):
    """Try the number in use, its neighbours, and what once was best."""
    _set(governor, Governor.SINCE, 0)
    _set(governor, Governor.BEFORE, index)
    _set(governor, Governor.FIRST, max(0, min(index - 1, best)))
    _set(governor, Governor.FINAL, min(field(governor, Governor.LAST), max(index + 1, best)))
    _try(state, governor, field(governor, Governor.FIRST))


@compiled
def _best(governor, first, final):
    best = first
    for i in range(first + 1, final + 1):
        if _time(governor, i) < _time(governor, best):
            best = i
    return best


@compiled
def _settle(state, governor):
    """After a search: use the best, and search less often where it is the same as before."""
    best = _best(governor, field(governor, Governor.FIRST), field(governor, Governor.FINAL))
    before = field(governor, Governor.BEFORE)
    if before >= 0 and _time(governor, best) * KEPT_WITHIN > _time(governor, before):
        best = before
    period = field(governor, Governor.PERIOD)
    _set(governor, Governor.PERIOD, min(2 * period, LAST_PERIOD))
    if best != before:
        _set(governor, Governor.PERIOD, FIRST_PERIOD)
    _set(governor, Governor.SINCE, 0)
    _use(state, governor, best)


@compiled
def reset_governor(state):
    """Before the first call: try every number."""
    governor = field(state, State.GOVERNOR)
    max_threads, last = field(state, State.THREADS), 0
    while 1 << last < max_threads:
        last += 1
    _set(governor, Governor.LAST, last)
    _set(governor, Governor.BEFORE, -1)
    _set(governor, Governor.FIRST, 0)
    _set(governor, Governor.FINAL, last)
    _set(governor, Governor.PERIOD, FIRST_PERIOD)
    _set(governor, Governor.SINCE, 0)
    _try(state, governor, 0)
