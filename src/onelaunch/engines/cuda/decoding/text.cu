// One launch that writes many tokens of one sequence: every stage of every layer, the choice of the
// token, and the next one.
//
// A CTA has the same rows of every weight from token to token. One warp, the producer, copies them
// ahead into a ring in shared memory, across stages and tokens: what a stage reads of the weights is
// there before what it reads of the stage before. Numbers go from CTA to CTA in words of 64 bits
// that hold the epoch beside the value: whoever reads a word until it has the right epoch has the
// value too, without a barrier. No word is written again before all have read it: every reader of a
// stage's words has a part in what that stage writes, and all parts are waited for.
//
// Every sum has a fixed order. Every wait has a timeout: it writes where it stood into the status,
// and from then on no wait waits.
//
// Shapes (macros): D model width, H heads, KV heads of keys and values, E head width, F hidden
// width, V vocabulary, LAYERS; GRID CTAs of WARPS warps and the producer. C chunks of the context.

struct Memory {
    Stored *keys, *values;  // (LAYERS, slots, KV, max_len, E)
    u64* words;             // of the stages, as in `Words`
    u32* status;            // 0, or where a wait timed out
    u64* written;           // (n,) on the host: the token and its logprob; all bits set before
    int* ending;            // (2,) on the host: how many tokens, and what ended the text
    const int* stop_ids;    // (LANES,), -1 where there is none
    // where tokens are drawn (DRAWS)
    u64* sums;              // (ROUNDS, SUMS), whatever they are
    const float* uniforms;  // (n,), from 0 to below 1
    int* history;           // (max_len,): the text's tokens, where there is a penalty
};

// Where the words of a stage lie.
struct Words {
    static constexpr int qkv = 0;
    static constexpr int mid = qkv + N_QKV / PER;  // x after attention
    static constexpr int hidden = mid + D / PER;
    static constexpr int x = hidden + F / PER;
    static constexpr int best = x + D / PER;       // of two tokens in turn, RECORD of each CTA
    static constexpr int drawn = best + 2 * RECORD * GRID;  // 3 of each CTA
    static constexpr int chosen = drawn + 3 * GRID;
    static constexpr int attention = chosen + 2;
};

// ---- the ring of weights

constexpr bool HEAD_BY_TENSOR_CORES = DTYPE == 0 && D % 32 == 0;
constexpr int HEAD_GROUP = HEAD_BY_TENSOR_CORES && 16 * D * (int)sizeof(Stored) <= SLOT_BYTES ? 16 : 8;
constexpr int X_UNIT = most(PER, most(unit_of(Q), unit_of(F)));  // out_proj and down have the same rows of x
constexpr int QKV_UNIT = most(PER, unit_of(D)), QKV_GROUP = group_of(N_QKV, QKV_UNIT), X_GROUP = group_of(D, X_UNIT);
constexpr int QKV_CTAS = ctas_of(N_QKV, QKV_UNIT, QKV_GROUP), X_CTAS = ctas_of(D, X_UNIT, X_GROUP);
constexpr int GATE_UP_CTAS = ctas_of(2 * F, 4, 4);
constexpr int X_ROWS = (D / X_UNIT + X_CTAS - 1) / X_CTAS * X_UNIT;  // of a CTA at most
// one stage's CTAs follow another's
constexpr int GATE_UP_OFFSET = QKV_CTAS + X_CTAS, ATTENTION_OFFSET = (GATE_UP_OFFSET + GATE_UP_CTAS) % GRID;
__host__ __device__ constexpr Rows rows_of(int stage) {
    switch (stage) {
        case QKV: return Rows(D, N_QKV, QKV_UNIT, QKV_GROUP, QKV_CTAS, 0);
        case OUT: return Rows(Q, D, X_UNIT, X_GROUP, X_CTAS, QKV_CTAS);
        case GATE_UP: return Rows(D, 2 * F, 4, 4, GATE_UP_CTAS, GATE_UP_OFFSET);
        case DOWN: return Rows(F, D, X_UNIT, X_GROUP, X_CTAS, QKV_CTAS);
        default: return Rows(D, V, unit_of(D), HEAD_GROUP, GRID, 0);
    }
}
__constant__ constexpr Rows ROWS[STAGES] = {
    rows_of(QKV), rows_of(OUT), rows_of(GATE_UP), rows_of(DOWN), rows_of(HEAD)};
static_assert(ROWS[QKV].fits() && ROWS[OUT].fits() && ROWS[GATE_UP].fits() && ROWS[DOWN].fits() && ROWS[HEAD].fits(), "tiles");

struct Shared {
    alignas(128) unsigned char ring[SLOTS][SLOT_BYTES];
    alignas(16) Stored narrow[D];                     // what qkv, gate_up and head read
    alignas(16) Stored wide[Q > F ? Q : F];           // what out_proj and down read
    alignas(16) float raw[3 * E];                     // what attention reads: a query, its key and value
    alignas(16) float rotated[WARPS][E];
    alignas(16) float partial[WARPS + 1][E + 2];
    float kept[X_ROWS];                               // this CTA's rows of x
    float best[RECORD * WARPS], records[RECORD * GRID];  // of the warps, of the CTAs
    alignas(8) u64 full[SLOTS];
    int first[STAGES], count[STAGES];                 // rows
#if DRAWS
    Drawn drawn;
#endif
    WatchdogState watchdog;
    u32 progress[WARPS];                              // no tile before it is needed
    u32 issued;                                       // tiles whose copies are under way, or there
    u32 ended;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");
using Consumer = Reader<Shared>;
static_assert(REPLICAS <= 8, "the lanes that have a hidden number");

// The producer: tiles in the order in which they are read, as far ahead as there is room.
DEVICE void produce(
    Shared& s, const Model& model, int n_tokens, int lane, Watchdog watchdog) {
    u32 tile = 0;
    bool open = true;  // until the text has ended
    auto put = [&](const Stored* from, u32 bytes) {
        wait_for_room(s, tile, lane, open, watchdog);
        if (!open) return;
        if (lane == 0) {
            const u32 slot = tile % SLOTS;
            expect(&s.full[slot], bytes);
            copy(s.ring[slot], from, bytes, &s.full[slot]);
            *(volatile u32*)&s.issued = tile + 1;
        }
        tile++;
    };
    const int steps = n_tokens * (4 * LAYERS + 1);
    int of_token = 0;
#pragma unroll 1
    for (int step = 0; step < steps && open; step++) {
        const int layer = of_token / 4, stage = of_token == 4 * LAYERS ? HEAD : of_token % 4;
        of_token = of_token == 4 * LAYERS ? 0 : of_token + 1;
        const Stored* weight = stage == QKV ? model.qkv : stage == OUT ? model.out
                               : stage == GATE_UP ? model.gate_up : stage == DOWN ? model.down : model.head;
        const int kw = ROWS[stage].kw, all = ROWS[stage].rows, of_tile = ROWS[stage].tile;
        int left = s.count[stage];
        const Stored* from = weight + ((stage == HEAD ? 0 : (long long)layer * all) + s.first[stage]) * kw;
#pragma unroll 1
        for (; left > 0 && open; left -= of_tile, from += of_tile * kw) put(from, least(left, of_tile) * kw * sizeof(Stored));
    }
    wait_for_copies(s, tile);
}

// ---- products of rows in shared memory

__host__ __device__ constexpr int per_lane(int kw) { return (kw + LANES - 1) / LANES; }
__host__ __device__ constexpr bool in_registers(int kw) { return kw <= 1024; }

// A lane's part of a row, of weights or of x, as registers: `words_of` of them.
template <int KW, int POS = 0, int VEC = width_of(KW)>
__host__ __device__ constexpr int words_of() {
    if constexpr (POS >= KW) return 0;
    else if constexpr (KW - POS >= LANES * VEC) return Raw<VEC>::WORDS + words_of<KW, POS + LANES * VEC, VEC>();
    else if constexpr (VEC > 1) return words_of<KW, POS, VEC / 2>();
    else return 1;
}
template <int KW, int WORDS, int POS = 0, int AT = 0, int VEC = width_of(KW)>
DEVICE void load_row(u32 (&words)[WORDS], const Stored* row, int lane) {
    if constexpr (POS < KW) {
        if constexpr (KW - POS >= LANES * VEC) {
            Raw<VEC> raw;
            raw.from_shared(row + POS + lane * VEC);
#pragma unroll
            for (int i = 0; i < Raw<VEC>::WORDS; i++) words[AT + i] = raw.of[i];
            load_row<KW, WORDS, POS + LANES * VEC, AT + Raw<VEC>::WORDS, VEC>(words, row, lane);
        } else if constexpr (VEC > 1) {
            load_row<KW, WORDS, POS, AT, VEC / 2>(words, row, lane);
        } else {
            Raw<1> raw;
            raw.clear();
            if (lane < KW - POS) raw.from_shared(row + POS + lane);
            words[AT] = raw.of[0];
        }
    }
}
template <int KW, int WORDS, int POS = 0, int AT = 0, int N = 0, int VEC = width_of(KW)>
DEVICE void as_floats(float (&x)[per_lane(KW)], const u32 (&words)[WORDS]) {
    if constexpr (POS < KW) {
        if constexpr (KW - POS >= LANES * VEC) {
            Raw<VEC> raw;
#pragma unroll
            for (int i = 0; i < Raw<VEC>::WORDS; i++) raw.of[i] = words[AT + i];
#pragma unroll
            for (int i = 0; i < VEC; i++) x[N + i] = raw[i];
            as_floats<KW, WORDS, POS + LANES * VEC, AT + Raw<VEC>::WORDS, N + VEC, VEC>(x, words);
        } else if constexpr (VEC > 1) {
            as_floats<KW, WORDS, POS, AT, N, VEC / 2>(x, words);
        } else {
            x[N] = Raw<1>{{words[AT]}}[0];
        }
    }
}
template <int KW, int WORDS, int POS = 0, int AT = 0, int N = 0, int VEC = width_of(KW)>
DEVICE void add_row(
    float (&sum)[2], const u32 (&words)[WORDS], const float (&x)[per_lane(KW)], int lane) {
    if constexpr (POS < KW) {
        if constexpr (KW - POS >= LANES * VEC) {
            Raw<VEC> raw;
#pragma unroll
            for (int i = 0; i < Raw<VEC>::WORDS; i++) raw.of[i] = words[AT + i];
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i % 2] = fmaf(raw[i], x[N + i], sum[i % 2]);
            add_row<KW, WORDS, POS + LANES * VEC, AT + Raw<VEC>::WORDS, N + VEC, VEC>(sum, words, x, lane);
        } else if constexpr (VEC > 1) {
            add_row<KW, WORDS, POS, AT, N, VEC / 2>(sum, words, x, lane);
        } else {
            Raw<1> raw{{words[AT]}};
            sum[1] = fmaf(raw[0], x[N], sum[1]);
        }
    }
}

// A stage's products: `fetch` brings what it reads into `from`, and `body(first, sums, squares)` takes
// each group's first row and each lane's part of its rows' sums and, of a norm, of x's squares. What
// does not need the input comes before `fetch`.
template <int STAGE, bool NORM, class Fetch, class Body>
DEVICE void run_stage(Consumer& c, int rows, const Stored* from, Fetch fetch, Body body) {
    constexpr Rows R = rows_of(STAGE);
    constexpr int KW = R.kw, N = R.group, GROUPS = R.tile / N, WORDS = words_of<KW>();
    constexpr bool HOLDS = in_registers(KW), AHEAD = HOLDS && N * WORDS <= 32;
    const int groups = (rows + N - 1) / N;
    u32 which = c.tile + c.warp / GROUPS;
    int in_tile = c.warp % GROUPS, group = c.warp;
    const Stored* tile = nullptr;
    u32 w[AHEAD ? N : 1][AHEAD ? WORDS : 1];
    auto row_at = [&](int r) { return tile + (in_tile * N + (group * N + r < rows ? r : 0)) * KW; };
    auto load = [&]() {
        if constexpr (AHEAD)
#pragma unroll
            for (int r = 0; r < N; r++) load_row<KW>(w[r], row_at(r), c.lane);
    };
    // of the tiles that may come before this stage has used one
    const bool ahead = group < groups && which < c.tile + SLOTS;
    if (ahead) tile = c.wait_for(which), load();
    c.tile += (rows + R.tile - 1) / R.tile;
    fetch();
    barrier();
    if (group < groups) {
        if (!ahead) tile = c.wait_for(which), load();
        float x[HOLDS ? per_lane(KW) : 1], squares = 0.0f;
        if constexpr (HOLDS) {
            u32 words[WORDS];
            load_row<KW>(words, from, c.lane);
            as_floats<KW>(x, words);
        }
        if constexpr (NORM) {
            float odd = 0.0f;
            if constexpr (HOLDS) {
#pragma unroll
                for (int i = 0; i < per_lane(KW); i++) (i % 2 ? odd : squares) = fmaf(x[i], x[i], i % 2 ? odd : squares);
            } else {
                constexpr int VEC = width_of(KW);
#pragma unroll 2
                for (int i = c.lane * VEC; i < KW; i += LANES * VEC) {
                    Raw<VEC> here;
                    here.from_shared(from + i);
#pragma unroll
                    for (int k = 0; k < VEC; k++) squares = fmaf(here[k], here[k], squares);
                }
            }
            squares += odd;
        }
#pragma unroll 1
        while (true) {
            float sums[N][2];
#pragma unroll
            for (int r = 0; r < N; r++) sums[r][0] = sums[r][1] = 0.0f;
            if constexpr (AHEAD) {
#pragma unroll
                for (int r = 0; r < N; r++) add_row<KW>(sums[r], w[r], x, c.lane);
            } else if constexpr (HOLDS) {
#pragma unroll
                for (int r = 0; r < N; r++) {
                    u32 words[WORDS];
                    load_row<KW>(words, row_at(r), c.lane);
                    add_row<KW>(sums[r], words, x, c.lane);
                }
            } else {
                constexpr int VEC = width_of(KW);
                const Stored* at[N];
#pragma unroll
                for (int r = 0; r < N; r++) at[r] = row_at(r);
#pragma unroll 2
                for (int i = c.lane * VEC; i < KW; i += LANES * VEC) {
                    Raw<VEC> here;
                    here.from_shared(from + i);
#pragma unroll
                    for (int r = 0; r < N; r++) {
                        Raw<VEC> raw;
                        raw.from_shared(at[r] + i);
#pragma unroll
                        for (int k = 0; k < VEC; k++) sums[r][k % 2] = fmaf(raw[k], here[k], sums[r][k % 2]);
                    }
                }
            }
            const int first = group * N;
            group += WARPS, in_tile += WARPS;
            const bool more = group < groups;
            if (more) {
                u32 next = which;
                while (in_tile >= GROUPS) in_tile -= GROUPS, next++;
                if (next != which) tile = c.wait_for(which = next);
                load();
            }
            float sum[N];
#pragma unroll
            for (int r = 0; r < N; r++) sum[r] = sums[r][0] + sums[r][1];
            body(first, sum, squares);
            if (!more) break;
        }
    }
    __syncwarp();
    if (c.lane == 0) *(volatile u32*)&c.s.progress[c.warp] = c.tile;
}

// 16 rows of D numbers, or eight, times x, on tensor cores: on every fourth lane the sums of row lane / 4
// and of that eight on. Of the eight columns of an mma one is used. Which k of an mma is which column of
// the weight is free, as long as both sides agree: here each lane's numbers stand side by side.
template <bool SIXTEEN>
DEVICE float2 multiply_rows(const Stored* lower, const Stored* upper, const Stored* x, int lane) {
    const int at = lane % 4 * 8;
    float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll 3
    for (int k = at; k < D; k += 32) {
        const uint4 a = *(const uint4*)(lower + k);
        uint4 b = {0, 0, 0, 0}, y = {0, 0, 0, 0};
        if (SIXTEEN) b = *(const uint4*)(upper + k);
        if (lane < 4) y = *(const uint4*)(x + k);
        multiply(even, a.x, b.x, a.y, b.y, y.x, y.y);
        multiply(odd, a.z, b.z, a.w, b.w, y.z, y.w);
    }
    return float2{even[0] + odd[0], even[2] + odd[2]};
}
DEVICE float rstd_of_narrow(const Shared& s, int lane) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < D; i += 2 * LANES) {
        Raw<2> x;
        x.clear();
        if (i + 2 * lane < D) x.from_shared(s.narrow + i + 2 * lane);
        squares = fmaf(x[0], x[0], fmaf(x[1], x[1], squares));
    }
    return rstd_of(squares);
}

// The head's products: `body(row, logit)` on every fourth lane.
template <class Fetch, class Body>
DEVICE void run_head(Consumer& c, int rows, Fetch fetch, Body body) {
    constexpr Rows R = rows_of(HEAD);
    constexpr int N = HEAD_GROUP, GROUPS = R.tile / N;
    const int groups = (rows + N - 1) / N, row = c.lane / 4, quad = c.lane % 4;
    u32 which = c.tile + c.warp / GROUPS;
    int in_tile = c.warp % GROUPS;
    const Stored* tile = nullptr;
    const bool ahead = c.warp < groups && which < c.tile + SLOTS;
    if (ahead) tile = c.wait_for(which);
    c.tile += (rows + R.tile - 1) / R.tile;
    fetch();
    barrier();
    const float rstd = rstd_of_narrow(c.s, c.lane);
    if (!ahead && c.warp < groups) tile = c.wait_for(which);
#pragma unroll 1
    for (int group = c.warp; group < groups; group += WARPS) {
        const int first = group * N;
        const Stored* lower = tile + (in_tile * N + (first + row < rows ? row : 0)) * D;
        const Stored* upper = tile + (in_tile * N + (first + row + 8 < rows ? row + 8 : 0)) * D;
        const float2 sums = multiply_rows<N == 16>(lower, upper, c.s.narrow, c.lane);
        in_tile += WARPS;
        if (group + WARPS < groups) {
            u32 next = which;
            while (in_tile >= GROUPS) in_tile -= GROUPS, next++;
            if (next != which) tile = c.wait_for(which = next);
        }
        if (quad == 0) {
            body(first + row, sums.x * rstd);
            if (N == 16) body(first + row + 8, sums.y * rstd);
        }
    }
    __syncwarp();
    if (c.lane == 0) *(volatile u32*)&c.s.progress[c.warp] = c.tile;
}

// What attention gives, of `chunks` chunks, into `to`.
DEVICE void gather_attention(
    const u64* words, int chunks, u32 epoch, int thread, Watchdog watchdog, u32 where, Stored* to) {
    constexpr int N = Q / PER, EACH = least(4, (N + THREADS - 1) / THREADS);
#pragma unroll 1
    for (int base = thread; base - thread < N; base += EACH * THREADS) {
        float m[EACH], l[EACH], sum[EACH][PER];
        int element[EACH], head[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            m[i] = LOWEST, l[i] = 0.0f;
#pragma unroll
            for (int k = 0; k < PER; k++) sum[i][k] = 0.0f;
            element[i] = least(base + i * THREADS, N - 1);
            head[i] = N + element[i] * PER / E;
        }
        const u64* of = words;
#pragma unroll 1
        for (int c = 0; c < chunks; c += 2, of += 2 * WORDS_OF_CHUNK) {
            // of two chunks at once; the second may not be there
            const u64* second = c + 1 < chunks ? of + WORDS_OF_CHUNK : of;
            u64 out[2][EACH], lse[2][EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                out[0][i] = load_word(of + element[i]), lse[0][i] = load_word(of + head[i]);
                out[1][i] = load_word(second + element[i]), lse[1][i] = load_word(second + head[i]);
            }
            while (true) {
                bool all = true;
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    all &= epoch_of(out[0][i]) == epoch && epoch_of(lse[0][i]) == epoch &&
                           epoch_of(out[1][i]) == epoch && epoch_of(lse[1][i]) == epoch;
                if (__all_sync(~0u, all) || __any_sync(~0u, !watchdog.waits(where))) break;
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    if (epoch_of(out[0][i]) != epoch) out[0][i] = load_word(of + element[i]);
                    if (epoch_of(lse[0][i]) != epoch) lse[0][i] = load_word(of + head[i]);
                    if (epoch_of(out[1][i]) != epoch) out[1][i] = load_word(second + element[i]);
                    if (epoch_of(lse[1][i]) != epoch) lse[1][i] = load_word(second + head[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const float one = value_of(lse[0][i]), other = second == of ? LOWEST : value_of(lse[1][i]);
                const float larger = fmaxf(m[i], fmaxf(one, other));
                const float old = power_of_2(m[i] - larger), p = power_of_2(one - larger), q = power_of_2(other - larger);
                alignas(8) float first_out[PER], second_out[PER];
                unpack((u32)out[0][i], first_out), unpack((u32)out[1][i], second_out);
#pragma unroll
                for (int k = 0; k < PER; k++) sum[i][k] = sum[i][k] * old + first_out[k] * p + second_out[k] * q;
                l[i] = l[i] * old + p + q;
                m[i] = larger;
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (base + i * THREADS < N)
                *(u32*)&to[PER * element[i]] = packed(quotient(sum[i][0], l[i]), quotient(sum[i][PER - 1], l[i]));
    }
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__((WARPS + MORE_WARPS) * LANES, 1) write_text(
    const GRID_CONSTANT Model model, const GRID_CONSTANT Memory memory, int slot, int n_slots, int max_len, int token,
    int position, int n_tokens, int passes, int stride, u32 epoch, u64 timeout_ns
#if DRAWS
    , int top_k, int first, float temperature, float top_p, float min_p, float penalty
#endif
#if TRACE
    , u64* trace
#endif
) {
    SHARED_MEMORY(bytes);
    Shared& s = *(Shared*)bytes;
    const int cta = blockIdx.x, thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES;
    Watchdog watchdog{&s.watchdog};

    if (thread < SLOTS)
        make_barrier(&s.full[thread]);
    if (thread < WARPS) s.progress[thread] = 0;
    if (thread < STAGES) {
        s.first[thread] = ROWS[thread].first(cta);
        s.count[thread] = ROWS[thread].end(cta) - ROWS[thread].first(cta);
    }
    if (thread == 0) s.issued = s.ended = s.watchdog.gave_up = s.watchdog.where = s.watchdog.layers = 0;
    show_to_copies();
    __syncthreads();

    if (warp >= WARPS) {
        give_registers<FEW_REGISTERS>();
        if (warp == WARPS) produce(s, model, n_tokens, lane, watchdog);
        if (warp == WARPS + 1 && lane == 0) run_watchdog(s, memory.status, timeout_ns);
        return;
    }
    take_registers<MANY_REGISTERS>();

    const int chunk = passes * CHUNK_STEP;
    const u64* words = memory.words + (long long)(cta % REPLICAS) * stride;  // that this CTA reads
    u64* copy = memory.words + (long long)(lane % REPLICAS) * stride;        // that this lane writes
    const int stop_id = memory.stop_ids[lane];
    Consumer consumer{s, warp, lane, watchdog, 0};
    const int qkv_rows = s.count[QKV], qkv_first = s.first[QKV], x_rows = s.count[OUT], x_first = s.first[OUT];
    const int hidden_rows = s.count[GATE_UP], hidden_first = s.first[GATE_UP] / 2;
    const int head_rows = s.count[HEAD], head_first = s.first[HEAD];
#if DRAWS
    const Drawing how{temperature, top_p, min_p, penalty, top_k};
    if (penalty != 1.0f) see_all(s.drawn, memory.history, position + 1, head_first, head_rows, thread);
#endif
    int ending = GROWING, count = 0;
#if TRACE
    int marks = 0;
#endif
    auto straight = [](int i) { return i; };

#pragma unroll 1
    for (int t = 0; t < n_tokens && ending == GROWING; t++, position++) {
        MARK(0, true)
        const Stored* row = model.embedding + (long long)token * D;
#pragma unroll 1
        for (int i = thread; i < x_rows; i += THREADS) s.kept[i] = as_float(row[x_first + i]);
        const int active = position / chunk + 1;  // chunks
        u32 here = epoch + (u32)t * LAYERS;       // of a layer's words

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++, here++) {
            const u32 where = 3u << 28 | (u32)layer << 4;
            if (thread == 0) *(volatile u32*)&s.watchdog.layers = here;
            auto take_x = [&](int i, u32 value) { *(u32*)&s.narrow[PER * i] = value; };
            auto fetch_x = [&]() {
                if (layer == 0) {
                    constexpr int EACH = (D + THREADS - 1) / THREADS;
                    Stored all[EACH];
#pragma unroll
                    for (int i = 0; i < EACH; i++) all[i] = thread + i * THREADS < D ? row[thread + i * THREADS] : (Stored)0;
#pragma unroll
                    for (int i = 0; i < EACH; i++)
                        if (thread + i * THREADS < D) s.narrow[thread + i * THREADS] = all[i];
                } else {
                    gather<D / PER>(words + Words::x, here - 1, thread, watchdog, where, take_x, straight);
                }
            };
            run_stage<QKV, true>(consumer, qkv_rows, s.narrow, [&]() {
                if (qkv_rows > 0) fetch_x();
                MARK(1, qkv_rows > 0)
            }, [&](int first, auto& sums, float squares) {
                constexpr int N = QKV_GROUP;
                const float rstd = rstd_of(squares);
#pragma unroll
                for (int r = 0; r < N; r++) sums[r] = sum_of_warp(sums[r]) * rstd;
#pragma unroll
                for (int r = 0; r < N; r += PER)
                    if (first + r < qkv_rows)
                        publish(copy, Words::qkv + (qkv_first + first + r) / PER,
                                packed(sums[r], sums[r + PER - 1]), here, lane);
            });
            MARK(2, qkv_rows > 0)

            // attention
            const int first_task = (cta - ATTENTION_OFFSET + GRID) % GRID;
#pragma unroll 1
            for (int task = first_task; task < active * H; task += GRID) {
                const int of_chunk = task / H, head = task % H, begin = of_chunk * chunk;
                const long long of_cache = (((long long)layer * n_slots + slot) * KV + head / GROUP) * max_len * E;
                if (task != first_task) barrier();
                attend(s, s.raw, model, memory.keys + of_cache, memory.values + of_cache,
                       [&]() { gather_head<THREADS>(s.raw, words + Words::qkv, head, here, thread, watchdog, where | 1); },
                       memory.words + Words::attention + (long long)of_chunk * WORDS_OF_CHUNK, stride, layer, head,
                       begin, chunk, passes, position, here, thread, [&]() { MARK(3, true) });
                MARK(4, true)
            }

            auto add_to_x = [&](int first, auto& parts, int to) {
                float old[X_GROUP], sum[X_GROUP];
#pragma unroll
                for (int r = 0; r < X_GROUP; r++) {
                    old[r] = s.kept[first + r < x_rows ? first + r : first];
                    sum[r] = sum_of_warp(parts[r]);
                }
                __syncwarp();
#pragma unroll
                for (int r = 0; r < X_GROUP; r++)
                    if (first + r < x_rows) {
                        sum[r] += old[r];
                        if (lane == 0) s.kept[first + r] = sum[r];
                    }
#pragma unroll
                for (int r = 0; r < X_GROUP; r += PER)
                    if (first + r < x_rows)
                        publish(copy, to + (x_first + first + r) / PER,
                                packed(sum[r], sum[r + PER - 1]), here, lane);
            };
            run_stage<OUT, false>(consumer, x_rows, s.wide, [&]() {
                if (x_rows > 0)
                    gather_attention(words + Words::attention, active, here, thread, watchdog, where | 2, s.wide);
                MARK(5, x_rows > 0)
            }, [&](int first, auto& sums, float) { add_to_x(first, sums, Words::mid); });
            MARK(6, x_rows > 0)

            run_stage<GATE_UP, true>(consumer, hidden_rows, s.narrow, [&]() {
                if (hidden_rows > 0) gather<D / PER>(words + Words::mid, here, thread, watchdog, where | 3, take_x, straight);
                MARK(7, hidden_rows > 0)
            }, [&](int first, auto& sums, float squares) {
                // four sums in six exchanges: a lane's row is its bits 4 and 3
                const float rstd = rstd_of(squares);
                const bool upper = lane & 16, second = lane & 8;
                float a = upper ? sums[2] : sums[0], b = upper ? sums[3] : sums[1];
                a += __shfl_xor_sync(~0u, upper ? sums[0] : sums[2], 16);
                b += __shfl_xor_sync(~0u, upper ? sums[1] : sums[3], 16);
                float sum = second ? b : a;
                sum += __shfl_xor_sync(~0u, second ? a : b, 8);
#pragma unroll
                for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
                sum *= rstd;
                // lanes without bit 3 have the gate, and those with it the up
                const float up = __shfl_xor_sync(~0u, sum, 8);
                const float hidden = quotient(sum, 1.0f + power_of_2(-LOG2E * sum)) * up;
                const float next = __shfl_xor_sync(~0u, hidden, 16);
                const int at = (hidden_first + first / 2) / PER;
                publish(copy, Words::hidden + at, packed(hidden, next), here, lane);
                if (PER == 1) publish(copy, Words::hidden + at + 1, packed(next, next), here, lane);
            });
            MARK(8, hidden_rows > 0)

            run_stage<DOWN, false>(consumer, x_rows, s.wide, [&]() {
                if (x_rows > 0)
                    gather<F / PER>(words + Words::hidden, here, thread, watchdog, where | 4,
                                    [&](int i, u32 value) { *(u32*)&s.wide[PER * i] = value; }, straight);
                MARK(9, x_rows > 0)
            }, [&](int first, auto& sums, float) { add_to_x(first, sums, Words::x); });
            MARK(10, x_rows > 0)
        }

        // of each lane the best of its rows of the head, and the sum of exp(logit - best)
        Best own;
        auto fetch_x = [&]() {
            gather<D / PER>(words + Words::x, here - 1, thread, watchdog, 4u << 28,
                      [&](int i, u32 value) { *(u32*)&s.narrow[PER * i] = value; }, straight);
            MARK(11, true)
        };
        auto add_logit = [&](int row, float logit) {
            if (row >= head_rows) return;
            if (!(logit == logit)) logit = INFINITE;  // a NaN is the best
#if DRAWS
            own.add(s.drawn.keep(row, logit, how), head_first + row, logit);
#else
            own.add(logit, head_first + row, logit);
#endif
        };
        if constexpr (HEAD_BY_TENSOR_CORES) {
            run_head(consumer, head_rows, fetch_x, add_logit);
        } else {
            run_stage<HEAD, true>(consumer, head_rows, s.narrow, fetch_x, [&](int first, auto& sums, float squares) {
                constexpr int N = HEAD_GROUP;
                const float rstd = rstd_of(squares);
                // N sums, halved with each exchange: a lane ends with that of row lane / (32 / N)
#pragma unroll
                for (int n = N / 2, step = 16; n > 0; n /= 2, step /= 2)
#pragma unroll
                    for (int i = 0; i < n; i++) {
                        const bool upper = lane & step;
                        const float mine = upper ? sums[i + n] : sums[i], other = upper ? sums[i] : sums[i + n];
                        sums[i] = mine + __shfl_xor_sync(~0u, other, step);
                    }
                float logit = sums[0];
#pragma unroll
                for (int step = LANES / N / 2; step > 0; step /= 2) logit += __shfl_xor_sync(~0u, logit, step);
                if (lane % (LANES / N) == 0) add_logit(first + lane / (LANES / N), logit * rstd);
            });
        }
        MARK(12, true)
        own.join_warp();
        own.total = sum_of_warp(own.total);
#if DRAWS
        remember_sums(s.drawn, memory.sums, how, thread);
        const float uniform = how.temperature > 0.0f ? memory.uniforms[first + t] : 0.0f;
#endif
        if (lane == 0) own.store(s.best + RECORD * warp);
        barrier();
        const u32 of_best = epoch + (u32)t;
        const int records = Words::best + (of_best & 1) * RECORD * GRID;
        if (warp == 0) {
            own.load(s.best + RECORD * (lane % WARPS));
            if (lane >= WARPS) own.total = 0.0f;
            own.join_warp();
            own.total = sum_of_warp(own.total);
            float record[RECORD];
            own.store(record);
#pragma unroll
            for (int i = 0; i < RECORD; i++) publish(copy, records + RECORD * cta + i, __float_as_uint(record[i]), of_best, lane);
            if (own.id < V)  // whichever is the next token, its row is in the L2
#pragma unroll 1
                for (int i = lane * 64; i < D; i += LANES * 64)
                    prefetch(model.embedding + (long long)own.id * D + i);
        }
        gather<RECORD * GRID>(words + records, of_best, thread, watchdog, 4u << 28 | 1,
                              [&](int i, u32 value) { s.records[i] = __uint_as_float(value); }, straight);
        barrier();
        MARK(13, true)
        const float best = best_of_all(s.records, token, lane);

        const bool finite = best < INFINITE && best > LOWEST;
        float logit = best;
#if DRAWS
        if (finite) {
            token = draw(s.drawn, memory.sums, words, copy, Words::drawn, Words::chosen, how, uniform, best, token,
                         head_first, head_rows, of_best, cta, thread, watchdog, 5u << 28);
            token = (u32)token < V ? token : 0;  // where a wait has timed out
            logit = __uint_as_float(s.drawn.chosen[1]);
        }
#endif
        if (!finite) {
            ending = NOT_FINITE;
        } else if (__any_sync(~0u, stop_id == token)) {
            ending = STOPPED;
        } else {
            if (cta == 0 && warp == WARPS - 1) {
                Normalizer normalizer;
                normalizer.find(s.records, lane);
                if (lane == 0) store_to_host(memory.written + count, normalizer.word_of(token, logit));
            }
#if DRAWS
            if (penalty != 1.0f && thread == 0) {
                see(s.drawn.seen, token, head_first, head_rows);
                if (cta == 0 && position + 1 < max_len) memory.history[position + 1] = token;
            }
#endif
            count++;
            if (count == n_tokens) ending = FULL;
        }
    }
    if (thread == 0) *(volatile u32*)&s.ended = 1;
    if (cta == 0 && thread == 0) {
        memory.ending[0] = count;
        memory.ending[1] = *(volatile u32*)memory.status != 0 ? -1 : ending;
    }
}
