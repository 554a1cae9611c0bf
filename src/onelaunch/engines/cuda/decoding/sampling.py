"""The last stage of a token in Triton: a token of each row's logits, and what follows from it.

Filters keep a set of the most likely tokens (engines/sampling.py has them in PyTorch). With weights
w = exp((logit - best) / temperature), which as positive floats are ordered like their bits, the set
is all weights above a threshold and some of those equal to it: bisection over the bits finds the
threshold, by sums over the vocabulary. A token is drawn by inverting the cumulative distribution of
the kept ones in the order of their ids.

Every sum has a fixed order, so that a seed draws the same tokens each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from onelaunch.engines.cuda.decoding import STOP_IDS
from onelaunch.engines.cuda.decoding.kernels import wait
from onelaunch.engines.sampling import LARGEST_FLOAT

# Columns of a slot's whole numbers, and of its fractions.
COUNT, LIMIT, FINISH, TOP_K, DRAWN = range(5)
WHOLE_NUMBERS = 8
TEMPERATURE, TOP_P, MIN_P, PENALTY = range(4)
FRACTIONS = 4
# What ended a slot's sequence.
GROWING, STOPPED, FULL, NOT_FINITE = range(4)

_COUNT, _LIMIT, _FINISH = tl.constexpr(COUNT), tl.constexpr(LIMIT), tl.constexpr(FINISH)
_TOP_K, _DRAWN = tl.constexpr(TOP_K), tl.constexpr(DRAWN)
_WHOLE, _FRACTIONS = tl.constexpr(WHOLE_NUMBERS), tl.constexpr(FRACTIONS)
_TEMPERATURE, _TOP_P = tl.constexpr(TEMPERATURE), tl.constexpr(TOP_P)
_MIN_P, _PENALTY = tl.constexpr(MIN_P), tl.constexpr(PENALTY)
_STOP_IDS = tl.constexpr(STOP_IDS)
_GROWING, _STOPPED = tl.constexpr(GROWING), tl.constexpr(STOPPED)
_FULL, _NOT_FINITE = tl.constexpr(FULL), tl.constexpr(NOT_FINITE)
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the weight of the best token
_LARGEST = tl.constexpr(LARGEST_FLOAT)


class Row(NamedTuple):
    """A row's logits, (V,), float32, and its penalty: `seen`, (V,), int32, is 1 for the tokens that
    it is for. None, both, without one. To be built where it is passed, like stages.common.Run.

    `seen` has as many bytes a token as the logits: with one byte Triton gives each thread four
    times as many tokens, in rows without a penalty too, and every sum gets another order."""

    logits: Any
    seen: Any
    penalty: Any


@triton.jit
def _load(row, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits from `start` on, with the penalty where the row has one; a NaN as infinity, so that it
    is the best."""
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row.logits + at, mask=at < V, other=float("-inf"), cache_modifier=".cg")
    logits = tl.where(logits == logits, logits, float("inf"))
    if row.seen is not None:
        seen = tl.load(row.seen + at, mask=at < V, other=0, cache_modifier=".cg")
        changed = tl.where(logits > 0, tl.div_rn(logits, row.penalty), logits * row.penalty)
        changed = tl.minimum(tl.maximum(changed, -_LARGEST), _LARGEST)
        logits = tl.where((seen != 0) & (tl.abs(logits) <= _LARGEST), changed, logits)
    return logits


@triton.jit
def _logits(held, row, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids from `start` on and their logits: `held` where one block holds all."""
    if V > BLOCK:
        held = _load(row, start, V, BLOCK)
    return start + tl.arange(0, BLOCK), held


@triton.jit
def _weights(held, row, start, best, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Ids from `start` on, their weights, 1 of the best, and the weights' bits, -1 beyond the last:
    `held` has the weights where one block holds all."""
    if V > BLOCK:
        held = tl.exp((_load(row, start, V, BLOCK) - best) * scale)
    at = start + tl.arange(0, BLOCK)
    return at, held, tl.where(at < V, held.to(tl.int32, bitcast=True), -1)


@triton.jit
def _best(held, row, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit and the lowest id that has it."""
    ids, best = _logits(held, row, 0, V, BLOCK)
    for start in tl.range(BLOCK, V, BLOCK):
        at, more = _logits(held, row, start, V, BLOCK)
        ids = tl.where(more > best, at, ids)
        best = tl.maximum(best, more)
    largest = tl.max(best, 0)
    return largest, tl.min(tl.where(best == largest, ids, V), 0)


@triton.jit
def _above(held, row, best, scale, threshold, V: tl.constexpr, BLOCK: tl.constexpr):
    """The weight and the number of tokens whose bits are above a threshold, and the number of those
    at it."""
    mass, count, ties = 0.0, 0, 0
    for start in tl.range(0, V, BLOCK):
        _, weights, bits = _weights(held, row, start, best, scale, V, BLOCK)
        mass += tl.sum(tl.where(bits > threshold, weights, 0.0), 0)
        count += tl.sum((bits > threshold).to(tl.int32), 0)
        ties += tl.sum((bits == threshold).to(tl.int32), 0)
    return mass, count, ties


@triton.jit
def _lowest(
    held, row, best, scale, floor, mass_goal, count_goal,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The smallest threshold, from `floor` on, above which there is less weight and there are fewer
    tokens than the goals; any of the thresholds that part the tokens in the same way."""
    low, high = floor - 1, tl.full([], _ONE, tl.int32)
    count_low, count_high = tl.full([], V, tl.int32), tl.full([], 0, tl.int32)
    while (high - low > 1) & (count_low != count_high):
        middle = low + (high - low) // 2
        mass, count, ties = _above(held, row, best, scale, middle, V, BLOCK)
        enough = (mass < mass_goal) & (count < count_goal)
        high = tl.where(enough, middle, high)
        # tokens from `high` on, and those above `low`: the same ones where none is between
        count_high = tl.where(enough, count + ties, count_high)
        low = tl.where(enough, low, middle)
        count_low = tl.where(enough, count_low, count)
    return high


@triton.jit
def _draw(held, row, best, whole_ptr, fraction_ptr, uniform, V: tl.constexpr, BLOCK: tl.constexpr):
    """The id that a uniform number draws."""
    # below this a quotient overflows for every logit but the best
    temperature = tl.maximum(tl.load(fraction_ptr + _TEMPERATURE), 1e-30)
    top_p, min_p = tl.load(fraction_ptr + _TOP_P), tl.load(fraction_ptr + _MIN_P)
    top_k = tl.load(whole_ptr + _TOP_K)
    scale = 1.0 / temperature
    if V <= BLOCK:
        held = tl.exp((held - best) * scale)
    floor = min_p.to(tl.int32, bitcast=True)  # weights from min_p on
    count_goal = tl.where(top_k > 0, top_k, V + 1)
    threshold = floor
    if top_k > 0:
        threshold = _lowest(held, row, best, scale, floor, float("inf"), count_goal, V, BLOCK)
    mass, count, ties = _above(held, row, best, scale, threshold, V, BLOCK)
    tie = threshold.to(tl.float32, bitcast=True)
    kept_ties = tl.minimum(ties, count_goal - count)
    total = mass + kept_ties.to(tl.float32) * tie
    if top_p < 1.0:
        goal = top_p * total
        threshold = _lowest(held, row, best, scale, threshold, goal, count_goal, V, BLOCK)
        mass, count, ties = _above(held, row, best, scale, threshold, V, BLOCK)
        tie = threshold.to(tl.float32, bitcast=True)
        # as many as reach the goal, and one at least where the best are equal
        needed = tl.ceil((goal - mass) / tl.maximum(tie, 1e-38)).to(tl.int32)
        kept_ties = tl.minimum(tl.minimum(ties, count_goal - count), tl.maximum(needed, 1))
        total = mass + kept_ties.to(tl.float32) * tie
    target = uniform * total
    before, ties_before = 0.0, 0
    passed = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, BLOCK):
        at, weights, bits = _weights(held, row, start, best, scale, V, BLOCK)
        equal = (bits == threshold).to(tl.int32)
        rank = tl.cumsum(equal, 0) - equal + ties_before
        kept = (bits > threshold) | ((equal == 1) & (rank < kept_ties))
        weights = tl.where(kept, weights, 0.0)
        reached = tl.cumsum(weights, 0) + before
        passed += ((reached <= target) & (at < V)).to(tl.int32)
        last = tl.maximum(last, tl.where(kept, at, 0))
        before += tl.sum(weights, 0)
        ties_before += tl.sum(equal, 0)
    # roundings of the sums may let the target be beyond them
    return tl.minimum(tl.sum(passed, 0), tl.max(last, 0))


@triton.jit
def _penalised(row, whole_ptr, fraction_ptr, drawn, uniform, V: tl.constexpr, BLOCK: tl.constexpr):
    """The token of a row that has a penalty."""
    held = 0.0
    if V <= BLOCK:
        held = _load(row, 0, V, BLOCK)
    best, token = _best(held, row, V, BLOCK)
    if drawn != 0:
        token = _draw(held, row, best, whole_ptr, fraction_ptr, uniform, V, BLOCK)
    return token


@triton.jit(do_not_specialize=("max_len",), repr=lambda s: "decode_sample")
def sample_kernel(
    logits_ptr, slots_ptr, positions_ptr, whole_ptr, fraction_ptr, stop_ptr, uniforms_ptr,
    tokens_ptr, logprobs_ptr, progress_ptr, embedding_ptr, x_ptr, following, seen_ptr, max_len,
    V: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """A token of each row: into its slot's tokens and logprobs, (S, max_len), and progress, (S, 2):
    how many there are, and what ended the sequence. These are in memory that the host reads. The
    token's row of the embedding is x, (B, D), of the next one; or `following`, a pair, has the
    token, (B,), int64, and its position, (B,), int32. A sequence that has ended stays as it is.

    whole: (S, 8), int32; fraction: (S, 4) and uniforms: (S, max_len), float32; stop: (S, 32),
    int32, -1 where there is none; seen: (S, V), int32, 1 for the tokens that a penalty is for, to
    which the row's own is added, or None where no row has a penalty."""
    b = tl.program_id(0)
    slot = tl.load(slots_ptr + b)
    whole_ptr += slot * _WHOLE
    fraction_ptr += slot * _FRACTIONS
    logits_ptr += b.to(tl.int64) * V
    count = tl.load(whole_ptr + _COUNT)
    limit = tl.load(whole_ptr + _LIMIT)
    drawn = tl.load(whole_ptr + _DRAWN)
    finish = tl.load(whole_ptr + _FINISH)
    uniform = tl.load(uniforms_ptr + slot * max_len + count, mask=count < max_len, other=0.0)
    stop = tl.load(stop_ptr + slot * _STOP_IDS + tl.arange(0, _STOP_IDS))
    wait(MODE)
    if finish == _GROWING:
        held = 0.0
        if V <= BLOCK:
            held = _load(Row(logits_ptr, None, None), 0, V, BLOCK)
        best, token = _best(held, Row(logits_ptr, None, None), V, BLOCK)
        finite = (best < float("inf")) & (best > float("-inf"))
        if finite:
            draws = drawn != 0
            if seen_ptr is not None:
                penalty = tl.load(fraction_ptr + _PENALTY)
                if penalty != 1.0:  # other rows take the same way as without `seen`: the same bits
                    draws = False
                    token = _penalised(
                        Row(logits_ptr, seen_ptr + slot * V, penalty),
                        whole_ptr, fraction_ptr, drawn, uniform, V, BLOCK,
                    )  # fmt: skip
            if draws:
                token = _draw(
                    held, Row(logits_ptr, None, None), best, whole_ptr, fraction_ptr, uniform,
                    V, BLOCK,
                )  # fmt: skip
            is_stop = tl.max((stop == token).to(tl.int32), 0) == 1
            if is_stop:
                finish = _STOPPED
            else:
                mass = tl.zeros([BLOCK], tl.float32)
                for start in tl.range(0, V, BLOCK):
                    _, logits = _logits(held, Row(logits_ptr, None, None), start, V, BLOCK)
                    mass += tl.exp(logits - best)
                chosen = tl.load(logits_ptr + token, cache_modifier=".cg")
                at = slot * max_len + count
                tl.store(tokens_ptr + at, token)
                tl.store(logprobs_ptr + at, chosen - best - tl.log(tl.sum(mass, 0)))
                if seen_ptr is not None:
                    tl.store(seen_ptr + slot * V + token, 1)
                count += 1
                tl.store(whole_ptr + _COUNT, count)
                if count >= limit:  # it has no next position
                    finish = _FULL
                else:
                    position = tl.load(positions_ptr + slot) + 1
                    tl.store(positions_ptr + slot, position)
                    if following is not None:
                        tl.store(following[0] + b, token.to(tl.int64))
                        tl.store(following[1] + b, position)
                    else:
                        column = tl.arange(0, WIDTH)
                        row = embedding_ptr + token.to(tl.int64) * D + column
                        x = tl.load(row, mask=column < D, other=0.0)
                        tl.store(x_ptr + b * D + column, x, mask=column < D)
        else:
            finish = _NOT_FINITE
        tl.store(whole_ptr + _FINISH, finish)
        tl.store(progress_ptr + 2 * slot, count)
        tl.store(progress_ptr + 2 * slot + 1, finish)
