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

constexpr int LANES = 32;
constexpr int THREADS = WARPS * LANES;  // without the producer
constexpr int N_QKV = (H + 2 * KV) * E, Q = H * E, GROUP = H / KV;
constexpr int WORDS_OF_CHUNK = Q + H;   // at most: outputs, and of each head the logarithm of its normalizer
constexpr int PAIRS = E / 2;
constexpr int CHUNK_OF_WARP = 16;       // positions, two lanes each
enum { QKV, OUT, GATE_UP, DOWN, HEAD, STAGES };  // of the weights, as they are read
constexpr int CHUNK_STEP = WARPS * CHUNK_OF_WARP;
constexpr float LOG2E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)
#define LOWEST (-3.0e38f)               // of a maximum that nothing has joined

// ---- numbers as they are stored

#if DTYPE == 2
typedef float Stored;
constexpr int VECTOR = 4;
DEVICE float as_float(Stored x) { return x; }
DEVICE Stored as_stored(float x) { return x; }
#else
typedef u16 Stored;
constexpr int VECTOR = 8;
#if DTYPE == 0
DEVICE float as_float(Stored x) { return __uint_as_float((u32)x << 16); }
DEVICE Stored as_stored(float x) { return to_bf16(x); }
#else
DEVICE float as_float(Stored x) { return from_f16(x); }
DEVICE Stored as_stored(float x) { return to_f16(x); }
#endif
#endif

// Two numbers as the value of a word: rounded as they are stored, or, in float32, the first alone.
constexpr int PER = DTYPE == 2 ? 1 : 2;
DEVICE u32 packed(float low, float high) {
#if DTYPE == 2
    return __float_as_uint(low);
#elif DTYPE == 0
    return to_bf16(low, high);
#else
    return to_f16(low, high);
#endif
}
DEVICE void unpack(u32 both, float* to) {  // to PER numbers
#if DTYPE == 2
    *to = __uint_as_float(both);
#elif DTYPE == 0
    *(float2*)to = float2{__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
#else
    *(float2*)to = float2{as_float((Stored)both), as_float((Stored)(both >> 16))};
#endif
}

// N consecutive stored numbers as one load of 2 to 16 bytes, in registers of 32 bits.
constexpr int PER_WORD = 4 / (int)sizeof(Stored);
template <int N>
struct Raw {
    static constexpr int WORDS = N < PER_WORD ? 1 : N / PER_WORD;
    u32 of[WORDS];

    DEVICE float operator[](int i) const {
#if DTYPE == 2
        return __uint_as_float(of[i]);
#elif DTYPE == 0
        return __uint_as_float(i % 2 ? of[i / 2] & 0xffff0000u : of[i / 2] << 16);
#else
        return as_float((Stored)(i % 2 ? of[i / 2] >> 16 : of[i / 2]));
#endif
    }
    DEVICE void from_shared(const Stored* at) {
        if constexpr (N * sizeof(Stored) == 16) {
            const uint4 v = *(const uint4*)at;
            of[0] = v.x, of[1] = v.y, of[2] = v.z, of[3] = v.w;
        } else if constexpr (N * sizeof(Stored) == 8) {
            const uint2 v = *(const uint2*)at;
            of[0] = v.x, of[1] = v.y;
        } else if constexpr (N * sizeof(Stored) == 4) {
            of[0] = *(const u32*)at;
        } else {
            of[0] = *(const unsigned short*)at;
        }
    }
    DEVICE void from_cache(const Stored* at) {  // past the L1
        if constexpr (N * sizeof(Stored) == 16) {
            const uint4 v = load_past_l1((const uint4*)at);
            of[0] = v.x, of[1] = v.y, of[2] = v.z, of[3] = v.w;
        } else if constexpr (N * sizeof(Stored) == 8) {
            const uint2 v = load_past_l1((const uint2*)at);
            of[0] = v.x, of[1] = v.y;
        } else if constexpr (N * sizeof(Stored) == 4) {
            of[0] = load_past_l1((const u32*)at);
        } else {
            of[0] = load_past_l1((const unsigned short*)at);
        }
    }
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) of[i] = 0;
    }
};

// ---- what a launch is given

struct Model {
    const Stored *embedding, *qkv, *norms, *out, *gate_up, *down, *head;
    const float *cos, *sin;
};
struct Memory {
    Stored *keys, *values;  // (LAYERS, slots, KV, max_len, E)
    u64* words;             // of the stages, as in `Words`
    u32* status;            // 0, or where a wait timed out
    u64* written;           // (n,) on the host: the token and its logprob; all bits set before
    int* ending;            // (2,) on the host: how many tokens, and what ended the text
    const int* stop_ids;    // (LANES,), -1 where there is none
};

enum { GROWING, STOPPED, FULL, NOT_FINITE };

// ---- words: a value and its epoch

DEVICE void store_word(u64* at, u32 value, u32 epoch) { store_word(at, (u64)epoch << 32 | value); }
DEVICE u32 epoch_of(u64 word) { return (u32)(word >> 32); }
DEVICE float value_of(u64 word) { return __uint_as_float((u32)word); }

// Where the words of a stage lie.
struct Words {
    static constexpr int qkv = 0;
    static constexpr int mid = qkv + N_QKV / PER;  // x after attention
    static constexpr int hidden = mid + D / PER;
    static constexpr int x = hidden + F / PER;
    static constexpr int best = x + D / PER;       // of two tokens in turn, 3 of each CTA
    static constexpr int attention = best + 2 * 3 * GRID;
};

// Every word is there REPLICAS times, so that not all CTAs look at the same line. Lanes of a warp
// that all have the value write them, each into its own copy of all words.
DEVICE void publish(u64* copy, int at, u32 value, u32 epoch, int lane) {
    if (lane < REPLICAS) store_word(copy + at, value, epoch);
}

// The time of a wait's first look at the clock, kept by the caller; 0 where there is no more waiting.
DEVICE u64 look_around(u32* status, u64 since, u64 timeout_ns, u32 where) {
    if (*(volatile u32*)status != 0) return 0;
    u64 time = now();
    if (since == 0) return time;
    if (time - since < timeout_ns) return since;
    atomicCAS(status, 0u, where);
    return 0;
}

// Looks that found nothing; `waits` is false once there is no more waiting.
struct Patience {
    u32* status;
    u64 timeout_ns, since = 0;
    u32 looks = 0;

    DEVICE bool waits(u32 where) {
        look_again();
        if ((++looks & 255u) != 0) return true;
        u64 still = look_around(status, since, timeout_ns, where);
        since = still;
        return still != 0;
    }
};

// ---- the ring of weights

// How the rows of a stage lie: `ctas` CTAs from `offset` on have them, in whole units, which make
// copies of 16 bytes and words; a tile of the ring has whole groups, of which each is one warp's.
struct Rows {
    int kw;     // numbers of a row
    int rows, unit, group, ctas, offset;
    int tile;   // rows of a tile
    __host__ __device__ constexpr Rows(int kw, int rows, int unit, int group, int ctas, int offset)
        : kw(kw), rows(rows), unit(unit), group(group), ctas(ctas), offset(offset % GRID),
          tile(SLOT_BYTES / (kw * (int)sizeof(Stored)) / both() * both()) {}
    __host__ __device__ constexpr int both() const {  // rows that are whole units and groups
        int step = unit;
        while (step % group != 0) step += unit;
        return step;
    }
    __host__ __device__ constexpr bool fits() const {
        return tile > 0 && rows % unit == 0 && unit * kw * (int)sizeof(Stored) % 16 == 0;
    }
    __host__ __device__ constexpr int first(int cta) const {
        const int place = (cta - offset + GRID) % GRID;
        return (int)((long long)least_of(place, ctas) * (rows / unit) / ctas) * unit;
    }
    __host__ __device__ constexpr int end(int cta) const {
        const int place = (cta - offset + GRID) % GRID;
        return (int)((long long)least_of(place + 1, ctas) * (rows / unit) / ctas) * unit;
    }
    static __host__ __device__ constexpr int least_of(int a, int b) { return a < b ? a : b; }
};
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int unit_of(int kw) {
    int unit = 1;
    while (kw * (int)sizeof(Stored) * unit % 16 != 0) unit *= 2;
    return unit;
}
// How many rows a warp takes at once: all of its rows of a stage, up to four. No more CTAs have rows
// than it takes to give every warp of theirs some: whoever has none does not read what they read.
__host__ __device__ constexpr int group_of(int rows, int unit) {
    const int of_cta = (rows / unit + GRID - 1) / GRID * unit, of_warp = (of_cta + WARPS - 1) / WARPS;
    return of_warp > 4 ? 4 : (of_warp + PER - 1) / PER * PER;
}
__host__ __device__ constexpr int ctas_of(int rows, int unit, int group) {
    const int of_cta = most(WARPS * group / unit, 1), ctas = (rows / unit + of_cta - 1) / of_cta;
    return ctas < GRID ? ctas : GRID;
}
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
    float best[3 * WARPS], records[3 * GRID];        // of the warps, of the CTAs
    alignas(8) u64 full[SLOTS];
    int first[STAGES], count[STAGES];                 // rows
    u32 progress[WARPS];                              // no tile before it is needed
    u32 issued;                                       // tiles whose copies are under way, or there
    u32 ended;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");
static_assert(REPLICAS <= 8, "the lanes that have a hidden number");

// The producer: tiles in the order in which they are read, as far ahead as there is room.
DEVICE void produce(Shared& s, const Model& model, int n_tokens, int lane, Patience patience) {
    u32 tile = 0;
    bool open = true;  // until the text has ended
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
        for (; left > 0 && open; left -= of_tile, from += of_tile * kw) {
            Patience still = patience;
#pragma unroll 1
            while (open) {
                u32 needed = tile + 1, end = 0;
                if (lane < WARPS) needed = *(volatile u32*)&s.progress[lane];
                if (lane == WARPS) end = *(volatile u32*)&s.ended;
                if (__any_sync(~0u, end)) open = false;
                if (!__any_sync(~0u, needed + SLOTS <= tile)) break;
                if (__any_sync(~0u, !still.waits(2u << 28 | tile))) open = false;
            }
            if (!open) break;
            if (lane == 0) {
                const u32 bytes = (left < of_tile ? left : of_tile) * kw * sizeof(Stored), slot = tile % SLOTS;
                copy(s.ring[slot], from, bytes, &s.full[slot]);
                *(volatile u32*)&s.issued = tile + 1;
            }
            tile++;
        }
    }
    // no copy is under way when the CTA ends
#pragma unroll 1
    for (u32 which = tile > SLOTS ? tile - SLOTS : 0; which < tile; which++)
        while (!has_come(&s.full[which % SLOTS], which / SLOTS & 1)) {}
}

// ---- products of rows in shared memory

// What each lane has of a row of KW numbers: blocks of 32 loads, as wide ones as rows are aligned.
__host__ __device__ constexpr int width_of(int kw) {
    int vector = VECTOR;
    while (kw % vector != 0) vector /= 2;
    return vector;
}
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
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

DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
// Floats as whole numbers of the same order.
DEVICE u32 ordered(float x) {
    const int bits = __float_as_int(x);
    return (u32)(bits ^ (bits >> 31 | (int)0x80000000));
}
DEVICE float value_of_ordered(u32 y) {
    return __uint_as_float(y & 0x80000000u ? y ^ 0x80000000u : ~y);
}

DEVICE float rstd_of(float squares) {  // of each lane's part
    return reciprocal_root(fmaf(sum_of_warp(squares), 1.0f / D, EPS));
}

DEVICE void barrier() {  // of the threads without the producer
    wait_for_threads<THREADS>();
}

struct Consumer {
    Shared& s;
    int warp, lane;
    Patience patience;
    u32 tile;  // the first of the next stage

    // A tile is there; none before it is needed: what was read of those has been computed with.
    DEVICE const Stored* wait_for(u32 which) {
        __syncwarp();
        if (lane == 0) *(volatile u32*)&s.progress[warp] = which;
        const u32 slot = which % SLOTS;
        // a barrier tells odd from even tiles alone: the one before in this slot must have been used
        Patience still = patience;
        while (*(volatile u32*)&s.issued <= which && still.waits(1u << 28 | which)) {}
        while (!has_come(&s.full[slot], which / SLOTS & 1) && still.waits(1u << 28 | which)) {}
        __syncwarp();
        return (const Stored*)s.ring[slot];
    }
};

// A stage's products: `fetch` brings what it reads into `from`, and `body(first, sums, rstd)` takes
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

// The head's products on tensor cores: `body(row, logit)` on every fourth lane. Of the eight columns of an mma one is used. Which k of an mma is which column of the
// weight is free, as long as both sides agree: here each lane's numbers stand side by side.
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
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < D; i += 2 * LANES) {
        Raw<2> x;
        x.clear();
        if (i + 2 * c.lane < D) x.from_shared(c.s.narrow + i + 2 * c.lane);
        squares = fmaf(x[0], x[0], fmaf(x[1], x[1], squares));
    }
    const float rstd = rstd_of(squares);
    if (!ahead && c.warp < groups) tile = c.wait_for(which);
#pragma unroll 1
    for (int group = c.warp; group < groups; group += WARPS) {
        const int first = group * N;
        const Stored* lower = tile + (in_tile * N + (first + row < rows ? row : 0)) * D + quad * 8;
        const Stored* upper = tile + (in_tile * N + (first + row + 8 < rows ? row + 8 : 0)) * D + quad * 8;
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll 3
        for (int k = 0; k < D; k += 32) {
            const uint4 a = *(const uint4*)(lower + k);
            uint4 b = {0, 0, 0, 0}, x = {0, 0, 0, 0};
            if (N == 16) b = *(const uint4*)(upper + k);
            if (row == 0) x = *(const uint4*)(c.s.narrow + k + quad * 8);
            multiply(even, a.x, b.x, a.y, b.y, x.x, x.y);
            multiply(odd, a.z, b.z, a.w, b.w, x.z, x.w);
        }
        in_tile += WARPS;
        if (group + WARPS < groups) {
            u32 next = which;
            while (in_tile >= GROUPS) in_tile -= GROUPS, next++;
            if (next != which) tile = c.wait_for(which = next);
        }
        if (quad == 0) {
            body(first + row, (even[0] + odd[0]) * rstd);
            if (N == 16) body(first + row + 8, (even[2] + odd[2]) * rstd);
        }
    }
    __syncwarp();
    if (c.lane == 0) *(volatile u32*)&c.s.progress[c.warp] = c.tile;
}

// ---- words that a whole CTA reads

// `take(i, value)` for each of N words, of which word i lies at `place(i)`.
template <int N, class Take, class Place>
DEVICE void gather(
    const u64* words, u32 epoch, int thread, Patience patience, u32 where, Take take, Place place) {
    constexpr int AT_ONCE = least(8, (N + THREADS - 1) / THREADS);
#pragma unroll 1
    for (int base = thread; base - thread < N; base += AT_ONCE * THREADS) {
        u64 word[AT_ONCE];
        const u64* at[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int i = base + j * THREADS;
            at[j] = words + place(i < N ? i : N - 1);
            word[j] = load_word(at[j]);
        }
        while (true) {
            bool all = true;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) all &= epoch_of(word[j]) == epoch;
            if (__all_sync(~0u, all) || !patience.waits(where)) break;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (epoch_of(word[j]) != epoch) word[j] = load_word(at[j]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (base + j * THREADS < N) take(base + j * THREADS, (u32)word[j]);
    }
}

// What attention gives, of `chunks` chunks, into `to`.
DEVICE void gather_attention(
    const u64* words, int chunks, u32 epoch, int thread, Patience patience, u32 where, Stored* to) {
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
                if (__all_sync(~0u, all) || !patience.waits(where)) break;
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

// ---- attention of one head of keys and values over one chunk

constexpr int HALF = E / 2;                               // numbers of a lane's half of a position
constexpr int HALF_VEC = width_of(HALF);
constexpr int LANE_PAIRS = (PAIRS + LANES - 1) / LANES;   // pairs of each lane, of a whole head
__host__ __device__ constexpr int pow2_from(int n) { int p = 1; while (p < n) p *= 2; return p; }
__host__ __device__ constexpr int pow2_to(int n) { int p = 1; while (2 * p <= n) p *= 2; return p; }
constexpr int STRIPES = PAIRS >= LANES ? 1 : LANES / pow2_from(PAIRS);  // lanes that share a pair
constexpr int WIDE = LANES / STRIPES;

struct Positions {  // of a warp: keys of a position on two lanes, values pair by pair
    Raw<HALF_VEC> keys[HALF / HALF_VEC];
    Raw<2> values[CHUNK_OF_WARP / STRIPES][LANE_PAIRS];

    // Those from `first` on, before `position`.
    DEVICE void load(const Stored* k, const Stored* v, int first, int position, int lane) {
        const int at = first + lane / 2;
        const Stored* key = k + (long long)at * E + lane % 2 * HALF;
#pragma unroll
        for (int i = 0; i < HALF / HALF_VEC; i++) {
            keys[i].clear();
            if (at < position) keys[i].from_cache(key + i * HALF_VEC);
        }
        const Stored* value = v + (long long)(first + lane / WIDE) * E + 2 * (lane % WIDE);
#pragma unroll
        for (int i = 0; i < CHUNK_OF_WARP / STRIPES; i++)
#pragma unroll
            for (int j = 0; j < LANE_PAIRS; j++) {
                values[i][j].clear();
                if (first + i * STRIPES + lane / WIDE < position && j * LANES + lane % WIDE < PAIRS)
                    values[i][j].from_cache(value + i * STRIPES * E + 2 * j * LANES);
            }
    }
};

// ---- the kernel

#if TRACE
#define MARK(point) if (thread == 0) { trace[(long long)cta * TRACE + marks % TRACE] = ticks() << 8 | (point); marks++; }
#else
#define MARK(point)
#endif

extern "C" __global__ void __launch_bounds__((WARPS + 1) * LANES, 1) write_text(
    const Model* model_at, const Memory* memory_at, int slot, int n_slots, int max_len, int token,
    int position, int n_tokens, int passes, int stride, u32 epoch, u64 timeout_ns
#if TRACE
    , u64* trace
#endif
) {
    SHARED_MEMORY(bytes);
    Shared& s = *(Shared*)bytes;
    const Model model = *model_at;
    const Memory memory = *memory_at;
    const int cta = blockIdx.x, thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES;
    Patience patience{memory.status, timeout_ns};

    if (thread < SLOTS)
        make_barrier(&s.full[thread]);
    if (thread < WARPS) s.progress[thread] = 0;
    if (thread < STAGES) {
        s.first[thread] = ROWS[thread].first(cta);
        s.count[thread] = ROWS[thread].end(cta) - ROWS[thread].first(cta);
    }
    if (thread == 0) s.issued = s.ended = 0;
    show_to_copies();
    __syncthreads();

    if (warp == WARPS) {
        produce(s, model, n_tokens, lane, patience);
        return;
    }

    const int chunk = passes * CHUNK_STEP;
    const u64* words = memory.words + (long long)(cta % REPLICAS) * stride;  // that this CTA reads
    u64* copy = memory.words + (long long)(lane % REPLICAS) * stride;        // that this lane writes
    const int stop_id = memory.stop_ids[lane];
    Consumer consumer{s, warp, lane, patience, 0};
    const int qkv_rows = s.count[QKV], qkv_first = s.first[QKV], x_rows = s.count[OUT], x_first = s.first[OUT];
    const int hidden_rows = s.count[GATE_UP], hidden_first = s.first[GATE_UP] / 2;
    const int head_rows = s.count[HEAD], head_first = s.first[HEAD];
    int ending = GROWING, count = 0;
#if TRACE
    int marks = 0;
#endif
    auto straight = [](int i) { return i; };

#pragma unroll 1
    for (int t = 0; t < n_tokens && ending == GROWING; t++, position++) {
        MARK(0)
        const Stored* row = model.embedding + (long long)token * D;
        const int active = position / chunk + 1;  // chunks
        u32 here = epoch + (u32)t * LAYERS;       // of a layer's words

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++, here++) {
            const u32 where = 3u << 28 | (u32)layer << 4;
            auto take_x = [&](int i, u32 value) { *(u32*)&s.narrow[PER * i] = value; };
            run_stage<QKV, true>(consumer, qkv_rows, s.narrow, [&]() {
                if (layer == 0) {
                    constexpr int EACH = (D + THREADS - 1) / THREADS;
                    Stored all[EACH];
                    float own = 0.0f;
#pragma unroll
                    for (int i = 0; i < EACH; i++) all[i] = thread + i * THREADS < D ? row[thread + i * THREADS] : (Stored)0;
                    if (thread < x_rows) own = as_float(row[x_first + thread]);
#pragma unroll
                    for (int i = 0; i < EACH; i++)
                        if (thread + i * THREADS < D) s.narrow[thread + i * THREADS] = all[i];
                    if (thread < x_rows) s.kept[thread] = own;
#pragma unroll 1
                    for (int i = thread + THREADS; i < x_rows; i += THREADS) s.kept[i] = as_float(row[x_first + i]);
                } else if (qkv_rows > 0) {
                    gather<D / PER>(words + Words::x, here - 1, thread, patience, where, take_x, straight);
                }
                MARK(1)
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
            MARK(2)

            // attention
            const int first_task = (cta - ATTENTION_OFFSET + GRID) % GRID;
#pragma unroll 1
            for (int task = first_task; task < active * H; task += GRID) {
                const int of_chunk = task / H, head = task % H, kv = head / GROUP, begin = of_chunk * chunk;
                const long long of_cache = (((long long)layer * n_slots + slot) * KV + kv) * max_len * E;
                const Stored *keys = memory.keys + of_cache, *values = memory.values + of_cache;
                Positions held;
                held.load(keys, values, begin + warp * CHUNK_OF_WARP, position, lane);
                float cos[LANE_PAIRS], sin[LANE_PAIRS], norms[2][LANE_PAIRS][2];
#pragma unroll
                for (int j = 0; j < LANE_PAIRS; j++) {
                    const int pair = j * LANES + lane < PAIRS ? j * LANES + lane : 0;
                    cos[j] = model.cos[(long long)position * PAIRS + pair];
                    sin[j] = model.sin[(long long)position * PAIRS + pair];
                    if (QK_NORM)
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            norms[k / 2][j][k % 2] = as_float(model.norms[((long long)layer * 2 + k / 2) * E + 2 * pair + k % 2]);
                }
                if (task != first_task) barrier();
                // its queries, key and value
                constexpr int OF_HEAD = E / PER;  // words
                gather<3 * OF_HEAD>(
                    words + Words::qkv, here, thread, patience, where | 1,
                    [&](int i, u32 value) { unpack(value, s.raw + PER * i); },
                    [&](int i) {
                        return i < OF_HEAD ? head * OF_HEAD + i
                               : i < 2 * OF_HEAD ? (H + kv - 1) * OF_HEAD + i
                                                 : (H + KV + kv - 2) * OF_HEAD + i;
                    });
                barrier();
                MARK(3)
                // the key and the query, normalized and rotated, as the cache has them
                const bool has_newest = position - begin < chunk;  // in this chunk
                float turned[2][LANE_PAIRS][2];
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    float a[LANE_PAIRS], b[LANE_PAIRS], squares = 0.0f;
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) {
                        const int pair = j * LANES + lane;
                        const float2 both = *(const float2*)&s.raw[which * E + 2 * (pair < PAIRS ? pair : 0)];
                        a[j] = pair < PAIRS ? both.x : 0.0f, b[j] = pair < PAIRS ? both.y : 0.0f;
                        squares += a[j] * a[j] + b[j] * b[j];
                    }
                    const float scale = QK_NORM ? reciprocal_root(sum_of_warp(squares) * (1.0f / E) + EPS) : 1.0f;
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) {
                        if (QK_NORM) a[j] *= scale * norms[which][j][0], b[j] *= scale * norms[which][j][1];
                        alignas(8) float both[2] = {a[j] * cos[j] - b[j] * sin[j], b[j] * cos[j] + a[j] * sin[j]};
                        if (PER == 2) unpack(packed(both[0], both[1]), both);
                        turned[which][j][0] = both[0], turned[which][j][1] = both[1];
                        const int pair = j * LANES + lane;
                        if (which == 0 && pair < PAIRS) *(float2*)&s.rotated[warp][2 * pair] = float2{both[0], both[1]};
                    }
                }
                if (warp == WARPS - 1) {
                    // the newest position is a part of its own
                    float* part = s.partial[WARPS];
                    float score = 0.0f;
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) {
                        score += turned[0][j][0] * turned[1][j][0] + turned[0][j][1] * turned[1][j][1];
                        const int pair = j * LANES + lane;
                        if (pair < PAIRS) *(float2*)&part[2 * pair] = *(const float2*)&s.raw[2 * E + 2 * pair];
                    }
                    score = sum_of_warp(score) * (SCALE * LOG2E);
                    if (lane == 0) part[E] = has_newest ? score : LOWEST, part[E + 1] = has_newest ? 1.0f : 0.0f;
                }
                __syncwarp();
#pragma unroll 1
                for (int pass = 0; pass < passes; pass++) {
                    const int first = begin + pass * CHUNK_STEP + warp * CHUNK_OF_WARP;
                    float* part = s.partial[warp];
                    if (first >= position) {
                        if (pass == 0 && lane == 0) part[E] = LOWEST, part[E + 1] = 0.0f;
                        break;
                    }
                    if (pass > 0) held.load(keys, values, first, position, lane);
                    const bool seen = first + lane / 2 < position;
                    const float* q = s.rotated[warp] + lane % 2 * HALF;
                    float even = 0.0f, odd = 0.0f;
#pragma unroll
                    for (int i = 0; i < HALF; i += 2) {
                        even = fmaf(held.keys[i / HALF_VEC][i % HALF_VEC], q[i], even);
                        odd = fmaf(held.keys[i / HALF_VEC][i % HALF_VEC + 1], q[i + 1], odd);
                    }
                    float score = even + odd;
                    score += __shfl_xor_sync(~0u, score, 1);
                    score = seen ? score * (SCALE * LOG2E) : LOWEST;
                    float m = value_of_ordered(__reduce_max_sync(~0u, ordered(score)));
                    if (pass > 0) m = fmaxf(m, part[E]);
                    const float p = seen ? power_of_2(score - m) : 0.0f;
                    float l = p, sum[LANE_PAIRS][2];
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) sum[j][0] = sum[j][1] = 0.0f;
#pragma unroll
                    for (int to = 16; to > 1; to /= 2) l += __shfl_xor_sync(~0u, l, to);
#pragma unroll
                    for (int i = 0; i < CHUNK_OF_WARP / STRIPES; i++) {
                        const float weight = __shfl_sync(~0u, p, 2 * (i * STRIPES + lane / WIDE));
#pragma unroll
                        for (int j = 0; j < LANE_PAIRS; j++) {
                            sum[j][0] = fmaf(weight, held.values[i][j][0], sum[j][0]);
                            sum[j][1] = fmaf(weight, held.values[i][j][1], sum[j][1]);
                        }
                    }
                    const float old = pass > 0 ? power_of_2(part[E] - m) : 0.0f;
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) {
#pragma unroll
                        for (int to = WIDE; to < LANES; to *= 2) {
                            sum[j][0] += __shfl_xor_sync(~0u, sum[j][0], to);
                            sum[j][1] += __shfl_xor_sync(~0u, sum[j][1], to);
                        }
                        const int pair = j * LANES + lane;
                        if (pair < PAIRS) {
                            float2* to = (float2*)&part[2 * pair];
                            if (pass > 0) sum[j][0] += to->x * old, sum[j][1] += to->y * old;
                            *to = float2{sum[j][0], sum[j][1]};
                        }
                    }
                    if (pass > 0) l += part[E + 1] * old;
                    __syncwarp();
                    if (lane == 0) part[E] = m, part[E + 1] = l;
                    __syncwarp();
                }
                barrier();
                // the parts
                // each word by a thread, or some of its copies
                constexpr int WORDS = E / PER, SPLIT = least(REPLICAS, pow2_to(THREADS / WORDS));
                u64* to = memory.words + Words::attention + (long long)of_chunk * WORDS_OF_CHUNK;
#pragma unroll 1
                for (int i = thread; i < WORDS * SPLIT; i += THREADS) {
                    const int e = i % WORDS * PER;
                    float m = LOWEST, l = 0.0f, out[PER];
#pragma unroll
                    for (int k = 0; k < PER; k++) out[k] = 0.0f;
                    const float(*parts)[E + 2] = s.partial;
#pragma unroll
                    for (int w = 0; w <= WARPS; w++) m = fmaxf(m, parts[w][E]);
#pragma unroll
                    for (int w = 0; w <= WARPS; w++) {
                        const float scale = power_of_2(parts[w][E] - m);
                        l = fmaf(scale, parts[w][E + 1], l);
#pragma unroll
                        for (int k = 0; k < PER; k++)  // what is not there may be anything
                            out[k] = fmaf(scale, scale > 0.0f ? parts[w][e + k] : 0.0f, out[k]);
                    }
                    const u32 value = packed(quotient(out[0], l), quotient(out[PER - 1], l));
                    const u32 lse = __float_as_uint(m + log_2(l));
#pragma unroll
                    for (int r = 0; r < REPLICAS / SPLIT; r++) {
                        u64* copy = to + (long long)(i / WORDS + r * SPLIT) * stride;
                        store_word(copy + (head * E + e) / PER, value, here);
                        if (e == 0) store_word(copy + Q / PER + head, lse, here);
                    }
                }
                // Other tokens read it, in this CTA; and in those of the other queries of the group,
                // which write the same numbers.
                if (warp == WARPS - 1 && has_newest) {
                    Stored* to_key = memory.keys + of_cache + (long long)position * E;
                    Stored* to_value = memory.values + of_cache + (long long)position * E;
#pragma unroll
                    for (int j = 0; j < LANE_PAIRS; j++) {
                        const int pair = j * LANES + lane;
                        if (pair < PAIRS)
#pragma unroll
                            for (int k = 0; k < 2; k++) {
                                to_key[2 * pair + k] = as_stored(turned[1][j][k]);
                                to_value[2 * pair + k] = as_stored(s.raw[2 * E + 2 * pair + k]);
                            }
                    }
                }
            }
            MARK(4)

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
                    gather_attention(words + Words::attention, active, here, thread, patience, where | 2, s.wide);
                MARK(5)
            }, [&](int first, auto& sums, float) { add_to_x(first, sums, Words::mid); });
            MARK(6)

            run_stage<GATE_UP, true>(consumer, hidden_rows, s.narrow, [&]() {
                if (hidden_rows > 0) gather<D / PER>(words + Words::mid, here, thread, patience, where | 3, take_x, straight);
                MARK(7)
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
            MARK(8)

            run_stage<DOWN, false>(consumer, x_rows, s.wide, [&]() {
                if (x_rows > 0)
                    gather<F / PER>(words + Words::hidden, here, thread, patience, where | 4,
                                    [&](int i, u32 value) { *(u32*)&s.wide[PER * i] = value; }, straight);
                MARK(9)
            }, [&](int first, auto& sums, float) { add_to_x(first, sums, Words::x); });
            MARK(10)
        }

        // of each lane the best of its rows of the head, and the sum of exp(logit - best)
        float best = LOWEST, total = 0.0f;
        int id = V;
        auto fetch_x = [&]() {
            gather<D / PER>(words + Words::x, here - 1, thread, patience, 4u << 28,
                      [&](int i, u32 value) { *(u32*)&s.narrow[PER * i] = value; }, straight);
            MARK(11)
        };
        auto add_logit = [&](int row, float logit) {
            if (row >= head_rows) return;
            if (!(logit == logit)) logit = INFINITE;  // a NaN is the best
            const float larger = fmaxf(best, logit);
            total = total * power_of_2((best - larger) * LOG2E) + power_of_2((logit - larger) * LOG2E);
            if (logit > best) id = head_first + row;
            best = larger;
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
        MARK(12)
        // of equal ones the lower id
        auto best_of_warp = [&]() {
            const u32 mine = ordered(best), all = __reduce_max_sync(~0u, mine);
            id = __reduce_min_sync(~0u, mine == all ? id : V);
            const float larger = value_of_ordered(all);
            total *= power_of_2((best - larger) * LOG2E);
            best = larger;
        };
        best_of_warp();
        total = sum_of_warp(total);
        if (lane == 0) s.best[3 * warp] = best, s.best[3 * warp + 1] = __int_as_float(id), s.best[3 * warp + 2] = total;
        barrier();
        const u32 of_best = epoch + (u32)t;
        const int records = Words::best + (of_best & 1) * 3 * GRID;
        if (warp == 0) {
            const int one = lane % WARPS;
            best = s.best[3 * one], id = __float_as_int(s.best[3 * one + 1]);
            total = lane < WARPS ? s.best[3 * one + 2] : 0.0f;
            best_of_warp();
            total = sum_of_warp(total);
            publish(copy, records + 3 * cta, __float_as_uint(best), of_best, lane);
            publish(copy, records + 3 * cta + 1, (u32)id, of_best, lane);
            publish(copy, records + 3 * cta + 2, __float_as_uint(total), of_best, lane);
            if (id < V)  // whichever is the next token, its row is in the L2
#pragma unroll 1
                for (int i = lane * 64; i < D; i += LANES * 64)
                    prefetch(model.embedding + (long long)id * D + i);
        }
        gather<3 * GRID>(words + records, of_best, thread, patience, 4u << 28 | 1,
                         [&](int i, u32 value) { s.records[i] = __uint_as_float(value); }, straight);
        barrier();
        MARK(13)
        best = LOWEST, id = V, total = 0.0f;
#pragma unroll
        for (int j = 0; j < (GRID + LANES - 1) / LANES; j++) {
            const int i = j * LANES + lane;
            if (i < GRID && s.records[3 * i] > best) best = s.records[3 * i], id = __float_as_int(s.records[3 * i + 1]);
        }
        best_of_warp();
        token = id < V ? id : 0;

        if (!(best < INFINITE && best > LOWEST)) {
            ending = NOT_FINITE;
        } else if (__any_sync(~0u, stop_id == token)) {
            ending = STOPPED;
        } else {
            if (cta == 0 && warp == WARPS - 1) {
                total = 0.0f;
#pragma unroll 1
                for (int i = lane; i < GRID; i += LANES) total += s.records[3 * i + 2] * power_of_2((s.records[3 * i] - best) * LOG2E);
                total = sum_of_warp(total);
                const u64 word = (u64)__float_as_uint(-log_2(total) / LOG2E) << 32 | (u32)token;
                if (lane == 0) store_to_host(memory.written + count, word);
            }
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
