
// How a token is drawn from the logits of all CTAs: what draw.cu and draws.cu share.
//
// A token's weight is exp((logit - best) / temperature), as a whole number of 2^-28: sums are exact, so
// that they do not depend on their order, nor on the grid. Filters keep all weights above a bound, and of
// those at it as many as are needed, those of the lowest ids. The bound is found digit by digit, from the
// highest on: all CTAs add their tokens' weights and numbers by the digit to the same sums. A token is
// drawn by inverting the cumulative distribution of the kept ones in the order of their ids, with a random
// number of the host's.
//
// A penalty divides or multiplies the logits of tokens that the text has (Keskar et al. 2019, CTRL).

#if DRAWS
constexpr int DIGITS = 4, BINS = 256;                 // of a weight, and values of a digit
constexpr int ROUNDS = 2 * DIGITS;                    // of two searches, by numbers of tokens and by weight
constexpr int SHIFTS[DIGITS] = {21, 13, 5, 0}, WIDTHS[DIGITS] = {8, 8, 8, 5};
constexpr float ONE = 268435456.0f;                   // 2^28
constexpr float LARGEST = 3.40282347e38f;             // of finite ones
constexpr int MASS_BITS = 46;                         // of a sum; the number of tokens lies above
static_assert(V < 1 << 18, "vocabulary");
constexpr int HEAD_MOST = (V + GRID - 1) / GRID + 1;  // rows of a CTA
constexpr int SEEN_WORDS = (HEAD_MOST + 31) / 32;     // a bit of each: whether the text has it
enum { BY_NUMBER, BY_MASS, FOUND };                   // what a search goes by

// What a sequence's tokens are drawn by; the most likely ones where the temperature is 0.
struct Drawing {
    float temperature, top_p, min_p, penalty;
    int top_k;

    DEVICE float scale() const { return LOG2E / fmaxf(temperature, 1e-30f); }
    DEVICE u32 most_tokens() const { return top_k > 0 ? (u32)top_k : 0xffffffffu; }
    // A finite logit stays finite.
    DEVICE float penalised(float logit) const {
        const float changed = logit > 0.0f ? logit / penalty : logit * penalty;
        return fabsf(logit) > LARGEST ? logit : fminf(fmaxf(changed, -LARGEST), LARGEST);
    }
    DEVICE float restored(float logit) const { return logit > 0.0f ? logit * penalty : logit / penalty; }
};
DEVICE u32 weight_of(float logit, float best, float scale) {
    return (u32)(power_of_2(fmaxf((logit - best) * scale, -200.0f)) * ONE + 0.5f);
}
DEVICE bool is_seen(const u32* seen, int row) { return seen[row / 32] >> row % 32 & 1; }
// A token is seen, where its row is this CTA's.
DEVICE void see(u32* seen, int token, int first_row, int rows) {
    const int row = token - first_row;
    if (row >= 0 && row < rows) atomicOr(&seen[row / 32], 1u << row % 32);
}

// The bound: weights above it are kept, and `ties` of those at it. `total` is their sum.
struct Search {
    u64 above, goal, total;
    u32 above_number, prefix, bound, ties, least_weight;
    int by, digit;

    // One thread's.
    DEVICE void begin(const Drawing& how) {
        const u32 floor = (u32)ceilf(how.min_p * ONE);
        bound = (floor > 1 ? floor : 1) - 1, ties = 0, total = 0;
        by = -1;
        go_on(how);
    }
    DEVICE void go_on(const Drawing& how) {  // to the next filter
        by++;
        if (by == BY_NUMBER && !(how.top_k > 0)) by++;
        if (by == BY_MASS && !(how.top_p < 1.0f)) by++;
        // after the first search all at its bound are looked at again: no more than top_k come of it
        least_weight = by == BY_MASS && how.top_k > 0 && ties > 0 ? bound : bound + 1;
        above = goal = 0, above_number = prefix = 0, digit = 0;
    }
    DEVICE bool looks_at(u32 weight) const {
        return weight >= least_weight && (digit == 0 || weight >> SHIFTS[most(digit - 1, 0)] == prefix);
    }
    DEVICE int bin_of(u32 weight) const { return weight >> SHIFTS[digit] & ((1u << WIDTHS[digit]) - 1); }

    // A digit of the bound, by a warp, when all CTAs have added, of the bins' sums: from the highest digit
    // down as long as what is above is less than the goals.
    template <class Sum>
    DEVICE void find_digit(const Drawing& how, Sum sum_of, int lane) {
        constexpr int EACH = BINS / LANES;
        const bool has_goal = by == BY_MASS;
        const u32 most_tokens = how.most_tokens();
        u64 mass[EACH], all = 0, all_number = 0;
        u32 number[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const u64 sum = sum_of(BINS - 1 - (lane * EACH + i));
            mass[i] = sum & ((1ull << MASS_BITS) - 1), number[i] = (u32)(sum >> MASS_BITS);
            all += mass[i], all_number += number[i];
        }
        const u64 up_to = sum_up_to(all, lane), number_up_to = sum_up_to(all_number, lane);
        const u64 whole = __shfl_sync(~0u, up_to, LANES - 1), known = total;
        u64 its_goal = goal;
        if (digit == 0 && has_goal) {
            its_goal = (u64)((double)how.top_p * (double)(known == 0 ? whole : known));
            its_goal = its_goal > 0 ? its_goal : 1;
        }
        u64 over = above + up_to - all;
        u32 over_number = above_number + (u32)(number_up_to - all_number);
        int lowest = BINS;
        u64 at_mass = 0, here_mass = 0;
        u32 at_number = 0, here_number = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if ((!has_goal || over < its_goal) && over_number < most_tokens) {
                lowest = BINS - 1 - (lane * EACH + i);
                at_mass = over, at_number = over_number, here_mass = mass[i], here_number = number[i];
            }
            over += mass[i], over_number += number[i];
        }
        const int bin = __reduce_min_sync(~0u, lowest);
        __syncwarp();
        if (lowest == bin) {
            bool found = false;
            const u32 its_prefix = prefix << WIDTHS[digit] | (u32)bin;
            goal = its_goal, above = at_mass, above_number = at_number, prefix = its_prefix;
            if (digit == DIGITS - 1) {
                // of those at the bound as many as reach the goal, and one at least
                u64 needed = here_number;
                if (has_goal && its_prefix > 0) needed = (its_goal - at_mass + its_prefix - 1) / its_prefix;
                needed = needed > 1 ? needed : 1;
                const u32 room = most_tokens - at_number;
                u32 left = needed < here_number ? (u32)needed : here_number;
                left = left < room ? left : room;
                // none of them: then whatever was looked at is kept
                bound = left > 0 || its_prefix >= least_weight ? its_prefix : least_weight - 1;
                ties = left, found = true;
                total = at_mass + (u64)left * its_prefix;
            } else if (here_number <= 1) {
                // it is at the bound, and whatever is below has no part
                const u32 least_here = its_prefix << SHIFTS[digit];
                bound = (least_here > least_weight ? least_here : least_weight) - 1;
                ties = 0, found = true;
                total = at_mass + here_mass;
            }
            if (found) go_on(how);
            else digit++;
        }
        __syncwarp();
    }
};

// Of all CTAs' kept weights and numbers of tokens at the bound, three words each, the CTA in which the
// cumulative weight passes a random number's part of the whole; what is left of that there, and how many
// tokens at the bound come before. By a warp.
struct Owner {
    int cta;
    u64 left;
    u32 ties;

    DEVICE void find(const u32* records, u32 bound, u32 all_ties, float uniform, int lane) {
        constexpr int EACH = (GRID + LANES - 1) / LANES;
        u64 sums[EACH], own = 0;
        u32 tie[EACH], own_ties = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int of = lane * EACH + i;
            sums[i] = of < GRID ? (u64)records[3 * of + 1] << 32 | records[3 * of] : 0;
            tie[i] = of < GRID ? records[3 * of + 2] : 0;
            own_ties += tie[i];
        }
        u32 ties_before = sum_up_to(own_ties, lane) - own_ties, ties_here[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            ties_here[i] = ties_before;
            const u32 room = all_ties > ties_before ? all_ties - ties_before : 0;
            sums[i] += (u64)(tie[i] < room ? tie[i] : room) * bound;
            ties_before += tie[i];
            own += sums[i];
        }
        u64 before = sum_up_to(own, lane);
        const u64 whole = __shfl_sync(~0u, before, LANES - 1), target = (u64)((double)uniform * (double)whole);
        before -= own;
        cta = GRID, left = 0, ties = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (before <= target && target < before + sums[i]) cta = lane * EACH + i, left = target - before, ties = ties_here[i];
            before += sums[i];
        }
        cta = __reduce_min_sync(~0u, cta);
        left = __shfl_sync(~0u, left, cta / EACH & 31), ties = __shfl_sync(~0u, ties, cta / EACH & 31);
    }
};

// The row, of those from `begin` to `end`, in which the cumulative weight passes `left`, where `seen`
// tokens at the bound come before; -1 where there is none. By a warp.
template <class Weight>
DEVICE int row_of(Weight weight, int begin, int end, u32 bound, u32 ties, u64 left, u32 seen, int lane) {
#pragma unroll 1
    for (int base = begin; base < end; base += LANES) {
        const int i = base + lane;
        const u32 q = i < end ? weight(i) : 0;
        const bool is_tie = i < end && ties > 0 && q == bound;
        const u32 tied = __ballot_sync(~0u, is_tie);
        const u32 rank = seen + __popc(tied & ((1u << lane) - 1));
        const u64 kept = i < end && (q > bound || (is_tie && rank < ties)) ? q : 0;
        const u64 up_to = sum_up_to(kept, lane);
        const u32 passed = __ballot_sync(~0u, up_to > left);
        if (passed != 0) return base + __ffs(passed) - 1;
        left -= __shfl_sync(~0u, up_to, LANES - 1);
        seen += __popc(tied);
    }
    return -1;
}
#endif
