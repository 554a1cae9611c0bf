// Drawing one token from the logits of all CTAs.
//
// A token's weight is exp((logit - best) / temperature), as a whole number of 2^-28: sums are exact, so
// that they do not depend on their order, nor on the grid. Filters keep all weights above a bound, and of
// those at it as many as are needed, those of the lowest ids. The bound is found digit by digit, from the
// highest on: all CTAs add their tokens' weights and numbers by the digit to the same sums, and whoever
// reads a sum subtracts what it was before the token. A token is drawn by inverting the cumulative
// distribution of the kept ones in the order of their ids, with a random number of the host's.

#if DRAWS
constexpr int DIGITS = 4, BINS = 256;                 // of a weight, and values of a digit
constexpr int SHIFTS[DIGITS] = {21, 13, 5, 0}, WIDTHS[DIGITS] = {8, 8, 8, 5};
constexpr float ONE = 268435456.0f;                   // 2^28
constexpr int MASS_BITS = 46;                         // of a sum; the number of tokens lies above
static_assert(V < 1 << 18, "vocabulary");
constexpr int HEAD_MOST = (V + GRID - 1) / GRID + 1;  // rows of a CTA
constexpr int SUMS = BINS + 16;                       // of a round: and how many CTAs have added theirs

// What a launch draws by. `first` is the number of the launch's first token.
struct Drawing {
    float temperature, top_p, min_p;
    int top_k, first;
};
struct Drawn {
    float logits[HEAD_MOST];
    alignas(16) u64 before[2 * DIGITS][BINS];
    u64 added[2 * DIGITS];
    u32 low[BINS], high[BINS], number[BINS];
    u64 above, goal, total, masses[WARPS];
    u32 above_number, prefix, bound, ties, done, of_warp[WARPS], records[3 * GRID], chosen[2];
};

// What the sums of the rounds to come are, before any CTA adds to them.
DEVICE void remember_sums(Drawn& d, const u64* sums, const Drawing& how, int thread) {
    const int rounds = (how.top_k > 0 ? DIGITS : 0) + (how.top_p < 1.0f ? DIGITS : 0);
#pragma unroll 1
    for (int i = thread; i < rounds * BINS; i += THREADS) d.before[i / BINS][i % BINS] = load_word(sums + i / BINS * SUMS + i % BINS);
    if (thread < rounds) d.added[thread] = load_word(sums + thread * SUMS + BINS);
}

// A round's digit of the bound, by the first warp, when all CTAs have added: from the highest digit down
// as long as what is above is less than the goals. The search is among weights from `least_weight` on.
DEVICE void find_digit(
    Drawn& d, const u64* sums, int round, int digit, u32 least_weight, u32 most_tokens, bool has_goal, float top_p,
    int lane) {
    constexpr int EACH = BINS / LANES;
    u64 mass[EACH], all = 0, all_number = 0;
    u32 number[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int bin = BINS - 1 - (lane * EACH + i);
        const u64 sum = load_word(sums + bin) - d.before[round][bin];
        mass[i] = sum & ((1ull << MASS_BITS) - 1), number[i] = (u32)(sum >> MASS_BITS);
        all += mass[i], all_number += number[i];
    }
    const u64 up_to = sum_up_to(all, lane), number_up_to = sum_up_to(all_number, lane);
    const u64 whole = __shfl_sync(~0u, up_to, LANES - 1);
    u64 goal = d.goal;
    if (digit == 0 && has_goal) {
        if (d.total == 0) d.total = whole;
        goal = (u64)((double)top_p * (double)d.total);
        goal = goal > 0 ? goal : 1;
    }
    u64 above = d.above + up_to - all;
    u32 above_number = d.above_number + (u32)(number_up_to - all_number);
    int lowest = BINS;
    u64 at_mass = 0, here_mass = 0;
    u32 at_number = 0, here_number = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if ((!has_goal || above < goal) && above_number < most_tokens) {
            lowest = BINS - 1 - (lane * EACH + i);
            at_mass = above, at_number = above_number, here_mass = mass[i], here_number = number[i];
        }
        above += mass[i], above_number += number[i];
    }
    const int bin = __reduce_min_sync(~0u, lowest);
    __syncwarp();
    if (lowest == bin) {
        d.goal = goal, d.above = at_mass, d.above_number = at_number;
        const u32 prefix = d.prefix << WIDTHS[digit] | (u32)bin;
        d.prefix = prefix;
        if (digit == DIGITS - 1) {
            // of those at the bound as many as reach the goal, and one at least
            u64 needed = here_number;
            if (has_goal && prefix > 0) needed = (goal - at_mass + prefix - 1) / prefix;
            needed = needed > 1 ? needed : 1;
            const u32 room = most_tokens - at_number;
            u32 ties = needed < here_number ? (u32)needed : here_number;
            ties = ties < room ? ties : room;
            // none of them: then whatever was looked at is kept
            d.bound = ties > 0 || prefix >= least_weight ? prefix : least_weight - 1;
            d.ties = ties, d.done = 1;
            d.total = at_mass + (u64)ties * prefix;
        } else if (here_number <= 1) {
            // it is at the bound, and whatever is below has no part
            const u32 least_here = prefix << SHIFTS[digit];
            d.bound = (least_here > least_weight ? least_here : least_weight) - 1;
            d.ties = 0, d.done = 1;
            d.total = at_mass + here_mass;
        }
    }
    __syncwarp();
}

// The token that a random number draws. `records` are words of 3 numbers of each CTA, `chosen` the two of
// the token and its logit; `where` is the first of three waits.
DEVICE int draw(
    Drawn& d, u64* all_sums, const u64* words, u64* copy, int records, int chosen, const Drawing& how, float uniform,
    float best, int first_row, int rows, u32 epoch, int cta, int thread, Patience patience, u32 where) {
    const int warp = thread / LANES, lane = thread % LANES;
    const float scale = LOG2E / fmaxf(how.temperature, 1e-30f);
    auto weight = [&](int i) {
        return (u32)(power_of_2(fmaxf((d.logits[i] - best) * scale, -200.0f)) * ONE + 0.5f);
    };
    u32 floor = (u32)ceilf(how.min_p * ONE);
    floor = floor > 1 ? floor : 1;
    if (thread == 0) d.bound = floor - 1, d.ties = 0, d.total = 0;
    int round = 0;
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; by_mass++) {
        if (by_mass ? !(how.top_p < 1.0f) : !(how.top_k > 0)) continue;
        const u32 most_tokens = how.top_k > 0 ? (u32)how.top_k : 0xffffffffu;
        // after the first search all at its bound are looked at again: no more than top_k come of it
        if (thread == 0) d.above = d.above_number = d.prefix = d.done = 0, d.goal = 0;
        barrier();
        const u32 least_weight = by_mass && how.top_k > 0 && d.ties > 0 ? d.bound : d.bound + 1;
        const int begin = round;
#pragma unroll 1
        for (int digit = 0; digit < DIGITS; digit++, round++) {
            u64* sums = all_sums + (begin + digit) * SUMS;
#pragma unroll 1
            for (int i = thread; i < BINS; i += THREADS) d.low[i] = d.high[i] = d.number[i] = 0;
            barrier();
            const u32 prefix = d.prefix;
#pragma unroll 1
            for (int i = thread; i < rows; i += THREADS) {
                const u32 q = weight(i);
                if (q >= least_weight && (digit == 0 || q >> SHIFTS[most(digit - 1, 0)] == prefix)) {
                    const u32 bin = q >> SHIFTS[digit] & ((1u << WIDTHS[digit]) - 1);
                    atomicAdd(&d.low[bin], q & 0xffffu), atomicAdd(&d.high[bin], q >> 16), atomicAdd(&d.number[bin], 1u);
                }
            }
            barrier();
#pragma unroll 1
            for (int i = thread; i < BINS; i += THREADS)
                if (d.number[i] > 0)
                    add_to(sums + i, (u64)d.number[i] << MASS_BITS | ((u64)d.high[i] << 16) + d.low[i]);
            barrier();
            if (warp == 0) {
                if (lane == 0) {
                    add_one(sums + BINS);
                    Patience still = patience;
                    while (count_so_far(sums + BINS) - d.added[begin + digit] < GRID && still.waits(where)) {}
                }
                __syncwarp();
                find_digit(d, sums, begin + digit, digit, least_weight, most_tokens, by_mass, how.top_p, lane);
            }
            barrier();
            if (d.done) break;
        }
        round = begin + DIGITS;
        barrier();  // all have read how it ended
    }
    if (round == 0) barrier();

    // each CTA's kept weight but of those at the bound, and how many of those it has
    const u32 bound = d.bound, ties = d.ties;
    const int of_warp = (rows + WARPS - 1) / WARPS, begin = warp * of_warp, end = least(rows, begin + of_warp);
    u64 mass = 0;
    u32 at_bound = 0;
#pragma unroll 1
    for (int i = begin + lane; i < end; i += LANES) {
        const u32 q = weight(i);
        mass += q > bound ? q : 0;
        at_bound += ties > 0 && q == bound;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        mass += __shfl_xor_sync(~0u, mass, step);
        at_bound += __shfl_xor_sync(~0u, at_bound, step);
    }
    if (lane == 0) d.masses[warp] = mass, d.of_warp[warp] = at_bound;
    barrier();
    if (warp == 0) {
        u64 sum = 0;
        u32 number = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += d.masses[w], number += d.of_warp[w];
        publish(copy, records + 3 * cta, (u32)sum, epoch, lane);
        publish(copy, records + 3 * cta + 1, (u32)(sum >> 32), epoch, lane);
        publish(copy, records + 3 * cta + 2, number, epoch, lane);
    }
    gather<3 * GRID>(words + records, epoch, thread, patience, where + 1, [&](int i, u32 value) { d.records[i] = value; },
                     [](int i) { return i; });
    barrier();

    // the CTA in which the cumulative weight passes the number's part of the whole
    constexpr int EACH = (GRID + LANES - 1) / LANES;
    u64 sums[EACH], own = 0;
    u32 tie[EACH], own_ties = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int of = lane * EACH + i;
        sums[i] = of < GRID ? (u64)d.records[3 * of + 1] << 32 | d.records[3 * of] : 0;
        tie[i] = of < GRID ? d.records[3 * of + 2] : 0;
        own_ties += tie[i];
    }
    u32 ties_before = sum_up_to(own_ties, lane) - own_ties;
    u32 ties_here[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        ties_here[i] = ties_before;
        const u32 left = ties > ties_before ? ties - ties_before : 0;
        sums[i] += (u64)(tie[i] < left ? tie[i] : left) * bound;
        ties_before += tie[i];
        own += sums[i];
    }
    u64 before = sum_up_to(own, lane);
    const u64 whole = __shfl_sync(~0u, before, LANES - 1), target = (u64)((double)uniform * (double)whole);
    before -= own;
    int it = GRID;
    u64 left_of_it = 0;
    u32 ties_of_it = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (before <= target && target < before + sums[i])
            it = lane * EACH + i, left_of_it = target - before, ties_of_it = ties_here[i];
        before += sums[i];
    }
    const int who = __reduce_min_sync(~0u, it);
    const int from = who / EACH;  // its lane
    left_of_it = __shfl_sync(~0u, left_of_it, from & 31), ties_of_it = __shfl_sync(~0u, ties_of_it, from & 31);
    if (cta == who) {
        // its warp, and there its token
        u64 left = left_of_it;
        u32 seen = ties_of_it;
        int owner = -1;
#pragma unroll 1
        for (int w = 0; w < WARPS && owner < 0; w++) {
            const u32 room = ties > seen ? ties - seen : 0, taken = d.of_warp[w] < room ? d.of_warp[w] : room;
            const u64 there = d.masses[w] + (u64)taken * bound;
            if (left < there) owner = w;
            else left -= there, seen += d.of_warp[w];
        }
        if (warp == owner) {
            bool found = false;
#pragma unroll 1
            for (int base = begin; base < end && !found; base += LANES) {
                const int i = base + lane;
                const u32 q = i < end ? weight(i) : 0;
                const bool is_tie = i < end && ties > 0 && q == bound;
                const u32 tied = __ballot_sync(~0u, is_tie);
                const u32 rank = seen + __popc(tied & ((1u << lane) - 1));
                const u64 kept = i < end && (q > bound || (is_tie && rank < ties)) ? q : 0;
                const u64 up_to = sum_up_to(kept, lane);
                const u32 passed = __ballot_sync(~0u, up_to > left);
                if (passed != 0) {
                    const int at = base + __ffs(passed) - 1;
                    publish(copy, chosen, (u32)(first_row + at), epoch, lane);
                    publish(copy, chosen + 1, __float_as_uint(d.logits[at]), epoch, lane);
                    found = true;
                } else {
                    left -= __shfl_sync(~0u, up_to, LANES - 1);
                    seen += __popc(tied);
                }
            }
        }
    }
    gather<2>(words + chosen, epoch, thread, patience, where + 2, [&](int i, u32 value) { d.chosen[i] = value; },
              [](int i) { return i; });
    barrier();
    return (int)d.chosen[0];
}
#endif

