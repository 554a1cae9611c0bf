
// Drawing one token of one sequence; see search.cu. Whoever reads a sum subtracts what it was before the
// token.

#if DRAWS
constexpr int SUMS = BINS + 16;                       // of a round: and how many CTAs have added theirs

struct Drawn {
    float logits[HEAD_MOST];
    u32 seen[SEEN_WORDS];
    alignas(16) u64 before[ROUNDS][BINS];
    u64 added[ROUNDS];
    Search search;
    u32 low[BINS], high[BINS], number[BINS];
    u64 masses[WARPS];
    u32 of_warp[WARPS], records[3 * GRID], chosen[2];

    // Keep a row's logit, and give what the token is chosen by.
    DEVICE float keep(int row, float logit, const Drawing& how) {
        if (how.penalty != 1.0f && is_seen(seen, row)) logit = how.penalised(logit);
        return logits[row] = logit;
    }
    // The token and its logit, without the penalty, from the CTA that has its row. A warp's.
    DEVICE void publish_row(u64* copy, int chosen_at, int row, int first_row, const Drawing& how, u32 epoch, int lane) {
        const bool changed = how.penalty != 1.0f && is_seen(seen, row);
        publish(copy, chosen_at, (u32)(first_row + row), epoch, lane);
        publish(copy, chosen_at + 1, __float_as_uint(changed ? how.restored(logits[row]) : logits[row]), epoch, lane);
    }
};

// Which tokens the text has, of `history` up to its last one.
DEVICE void see_all(Drawn& d, const int* history, int n, int first_row, int rows, int thread) {
    for (int i = thread; i < SEEN_WORDS; i += THREADS) d.seen[i] = 0;
    barrier();
#pragma unroll 1
    for (int i = thread; i < n; i += THREADS) see(d.seen, history[i], first_row, rows);
    barrier();
}

// What the sums of the rounds to come are, before any CTA adds to them.
DEVICE void remember_sums(Drawn& d, const u64* sums, const Drawing& how, int thread) {
    const int rounds = (how.top_k > 0 ? DIGITS : 0) + (how.top_p < 1.0f ? DIGITS : 0);
#pragma unroll 1
    for (int i = thread; i < rounds * BINS; i += THREADS) d.before[i / BINS][i % BINS] = load_word(sums + i / BINS * SUMS + i % BINS);
    if (thread < rounds) d.added[thread] = load_word(sums + thread * SUMS + BINS);
}

// The token that a random number draws, or the best one, whose id is `its_id`, where there is no
// temperature. `records` are words of 3 numbers of each CTA, `chosen` the two of the token and its logit;
// `where` is the first of three waits.
DEVICE int draw(
    Drawn& d, u64* all_sums, const u64* words, u64* copy, int records, int chosen, const Drawing& how, float uniform,
    float best, int its_id, int first_row, int rows, u32 epoch, int cta, int thread, Watchdog watchdog, u32 where) {
    const int warp = thread / LANES, lane = thread % LANES;
    if (!(how.temperature > 0.0f)) {
        const int row = its_id - first_row;
        if (warp == 0 && row >= 0 && row < rows) d.publish_row(copy, chosen, row, first_row, how, epoch, lane);
    } else {
        const float scale = how.scale();
        auto weight = [&](int i) { return weight_of(d.logits[i], best, scale); };
        Search& search = d.search;
        if (thread == 0) search.begin(how);
        barrier();
#pragma unroll 1
        for (int round = 0; search.by != FOUND; round++) {
            u64* sums = all_sums + round * SUMS;
#pragma unroll 1
            for (int i = thread; i < BINS; i += THREADS) d.low[i] = d.high[i] = d.number[i] = 0;
            barrier();
#pragma unroll 1
            for (int i = thread; i < rows; i += THREADS) {
                const u32 q = weight(i);
                if (search.looks_at(q)) {
                    const int bin = search.bin_of(q);
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
                    while (count_so_far(sums + BINS) - d.added[round] < GRID && watchdog.waits(where)) {}
                }
                __syncwarp();
                search.find_digit(how, [&](int bin) { return load_word(sums + bin) - d.before[round][bin]; }, lane);
            }
            barrier();
        }

        // each CTA's kept weight but of those at the bound, and how many of those it has
        const u32 bound = search.bound, ties = search.ties;
        const int of_warp = (rows + WARPS - 1) / WARPS, begin = warp * of_warp, end = least(rows, begin + of_warp);
        u64 mass = 0;
        u32 at_bound = 0;
#pragma unroll 1
        for (int i = begin + lane; i < end; i += LANES) {
            const u32 q = weight(i);
            mass += q > bound ? q : 0;
            at_bound += ties > 0 && q == bound;
        }
        mass = sum_of_warp(mass), at_bound = sum_of_warp(at_bound);
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
        gather<3 * GRID>(words + records, epoch, thread, watchdog, where + 1, [&](int i, u32 value) { d.records[i] = value; },
                         [](int i) { return i; });
        barrier();
        Owner owner;
        owner.find(d.records, bound, ties, uniform, lane);
        if (cta == owner.cta) {
            // its warp, and there its token
            u64 left = owner.left;
            u32 seen = owner.ties;
            int its_warp = -1;
#pragma unroll 1
            for (int w = 0; w < WARPS && its_warp < 0; w++) {
                const u32 room = ties > seen ? ties - seen : 0, taken = d.of_warp[w] < room ? d.of_warp[w] : room;
                const u64 there = d.masses[w] + (u64)taken * bound;
                if (left < there) its_warp = w;
                else left -= there, seen += d.of_warp[w];
            }
            if (warp == its_warp) {
                const int row = row_of(weight, begin, end, bound, ties, left, seen, lane);
                if (row >= 0) d.publish_row(copy, chosen, row, first_row, how, epoch, lane);
            }
        }
    }
    gather<2>(words + chosen, epoch, thread, watchdog, where + 2, [&](int i, u32 value) { d.chosen[i] = value; },
              [](int i) { return i; });
    barrier();
    return (int)d.chosen[0];
}
#endif
