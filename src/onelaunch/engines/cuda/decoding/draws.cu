
// Drawing one token of each of several sequences; see search.cu. A warp has a sequence, or several in turn,
// and so a bound, a search and a token; the CTAs meet once a round for all of them. A launch's sums of a
// token are made zero when the token is chosen, those of the next one are others: before that one is
// chosen, all CTAs have met.

#if DRAWS
constexpr int SUMS_OF_ROUND = SEQUENCES * BINS + 16;  // and how many CTAs have added theirs
constexpr int SUMS_OF_GROUP = 2 * ROUNDS * SUMS_OF_ROUND;

struct DrawnSequences {
    float* logits;          // of each sequence, V apart, from this CTA's first row on
    u32 seen[SEQUENCES][SEEN_WORDS];
    u32 low[WARPS][BINS], high[WARPS][BINS], number[WARPS][BINS];
    Search search[SEQUENCES];
    Drawing how[SEQUENCES];
    float best[SEQUENCES];  // what is chosen by
    int id[SEQUENCES];      // of the best; V where none is chosen
    u32 chosen[2 * SEQUENCES];

    DEVICE bool draws(int r) const { return id[r] < V && how[r].temperature > 0.0f; }
    // Keep a row's logit, and give what the token is chosen by.
    DEVICE float keep(int r, int row, float logit) {
        if (how[r].penalty != 1.0f && is_seen(seen[r], row)) logit = how[r].penalised(logit);
        return logits[(long long)r * V + row] = logit;
    }
    // The token and its logit, without the penalty, from the CTA that has its row. A warp's.
    DEVICE void publish_row(u64* copy, int chosen_at, int r, int row, int first_row, u32 epoch, int lane) {
        const bool changed = how[r].penalty != 1.0f && is_seen(seen[r], row);
        const float its = logits[(long long)r * V + row], logit = changed ? how[r].restored(its) : its;
        publish(copy, chosen_at + 2 * r, (u32)(first_row + row), epoch, lane);
        publish(copy, chosen_at + 2 * r + 1, __float_as_uint(logit), epoch, lane);
    }
};

// Of each of n sequences the token that its random number draws, or the best one where it has no temperature,
// and its logit, into `chosen`. `sums` are those of the group; `records` words of 3 numbers of each sequence's
// CTAs, which `their_records` is room for; `uniform(r)` a random number; `where` the first of three waits.
template <class Uniform>
DEVICE void draw_all(
    DrawnSequences& d, u32* their_records, u64* sums, const u64* words, u64* copy, int records, int chosen, Uniform uniform,
    int n, int first_row, int rows, u32 epoch, int cta, int thread, Watchdog watchdog, u32 where) {
    const int warp = thread / LANES, lane = thread % LANES;
    sums += (epoch & 1) * ROUNDS * SUMS_OF_ROUND;
#pragma unroll 1
    for (int r = warp; r < n; r += WARPS) {
        if (lane == 0) {
            if (d.draws(r)) d.search[r].begin(d.how[r]);
            else d.search[r].by = FOUND;
        }
    }
    barrier();
    int round = 0;
#pragma unroll 1
    for (; round < ROUNDS; round++) {
        bool all_found = true;
        for (int r = 0; r < n; r++) all_found &= d.search[r].by == FOUND;
        if (all_found) break;
        u64* of_round = sums + round * SUMS_OF_ROUND;
        u32 *low = d.low[warp], *high = d.high[warp], *number = d.number[warp];
#pragma unroll 1
        for (int r = warp; r < n; r += WARPS) {
            const Search& search = d.search[r];
            if (search.by == FOUND) continue;
            for (int i = lane; i < BINS; i += LANES) low[i] = high[i] = number[i] = 0;
            __syncwarp();
            const float scale = d.how[r].scale(), best = d.best[r];
#pragma unroll 4
            for (int i = lane; i < rows; i += LANES) {
                const u32 q = weight_of(d.logits[(long long)r * V + i], best, scale);
                if (search.looks_at(q)) {
                    const int bin = search.bin_of(q);
                    atomicAdd(&low[bin], q & 0xffffu), atomicAdd(&high[bin], q >> 16), atomicAdd(&number[bin], 1u);
                }
            }
            __syncwarp();
            for (int i = lane; i < BINS; i += LANES)
                if (number[i] > 0)
                    add_to(of_round + r * BINS + i, (u64)number[i] << MASS_BITS | ((u64)high[i] << 16) + low[i]);
            __syncwarp();
        }
        barrier();
        if (thread == 0) {
            u64* count = of_round + SEQUENCES * BINS;
            add_one(count);
            while (count_so_far(count) < GRID && watchdog.waits(where)) {}
        }
        barrier();
#pragma unroll 1
        for (int r = warp; r < n; r += WARPS)
            if (d.search[r].by != FOUND)
                d.search[r].find_digit(d.how[r], [&](int bin) { return load_word(of_round + r * BINS + bin); }, lane);
        barrier();
    }

    // each CTA's kept weight but of those at the bound, and how many of those it has
#pragma unroll 1
    for (int r = warp; r < n; r += WARPS) {
        u64 mass = 0;
        u32 at_bound = 0;
        if (d.draws(r)) {
            const u32 bound = d.search[r].bound, ties = d.search[r].ties;
            const float scale = d.how[r].scale(), best = d.best[r];
#pragma unroll 4
            for (int i = lane; i < rows; i += LANES) {
                const u32 q = weight_of(d.logits[(long long)r * V + i], best, scale);
                mass += q > bound ? q : 0;
                at_bound += ties > 0 && q == bound;
            }
            mass = sum_of_warp(mass), at_bound = sum_of_warp(at_bound);
        }
        const int at = records + (r * GRID + cta) * 3;
        publish(copy, at, (u32)mass, epoch, lane);
        publish(copy, at + 1, (u32)(mass >> 32), epoch, lane);
        publish(copy, at + 2, at_bound, epoch, lane);
    }
    gather_row<SEQUENCES * 3 * GRID>(words + records, n * 3 * GRID, epoch, thread, watchdog, where + 1,
                                     [&](int i, u32 value) { their_records[i] = value; });
    barrier();
#pragma unroll 1
    for (int r = warp; r < n; r += WARPS) {
        int row = -1;
        if (d.draws(r)) {
            const u32 bound = d.search[r].bound, ties = d.search[r].ties;
            const float scale = d.how[r].scale(), best = d.best[r];
            Owner owner;
            owner.find(their_records + r * GRID * 3, bound, ties, uniform(r), lane);
            if (cta == owner.cta)
                row = row_of([&](int i) { return weight_of(d.logits[(long long)r * V + i], best, scale); }, 0, rows, bound, ties, owner.left,
                             owner.ties, lane);
        } else if (d.id[r] < V) {
            row = d.id[r] - first_row;
        } else if (cta == 0) {  // it has ended: which one is not read
            publish(copy, chosen + 2 * r, 0, epoch, lane);
            publish(copy, chosen + 2 * r + 1, 0, epoch, lane);
        }
        if (row >= 0 && row < rows) d.publish_row(copy, chosen, r, row, first_row, epoch, lane);
    }
    gather_row<2 * SEQUENCES>(words + chosen, 2 * n, epoch, thread, watchdog, where + 2,
                              [&](int i, u32 value) { d.chosen[i] = value; });
    barrier();
#pragma unroll 1
    for (int i = cta * THREADS + thread; i < round * SUMS_OF_ROUND; i += GRID * THREADS) store_word(sums + i, 0);
}
#endif
