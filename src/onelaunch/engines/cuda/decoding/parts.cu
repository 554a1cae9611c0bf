// What the kernels of one text and of several share: numbers, words, the rows of a CTA, attention.

constexpr int LANES = 32;
constexpr int THREADS = WARPS * LANES;  // that compute
constexpr int MORE_WARPS = 4;  // one brings weights, one watches, and the others make a group of four
constexpr int FEW_REGISTERS = 40, MANY_REGISTERS = 232;
constexpr int N_QKV = (H + 2 * KV) * E, Q = H * E, GROUP = H / KV;
// outputs, at most, and of each head the logarithm of its normalizer; an even number
constexpr int WORDS_OF_CHUNK = (Q + H + 1) / 2 * 2;
constexpr int PAIRS = E / 2;
constexpr int CHUNK_OF_WARP = 16;       // positions, two lanes each
enum { QKV, OUT, GATE_UP, DOWN, HEAD, STAGES };  // of the weights, as they are read
constexpr int CHUNK_STEP = WARPS * CHUNK_OF_WARP;
constexpr float LOG2E = 1.4426950408889634f;
// What is best in a CTA: what it is chosen by and its id, a sum of exp(logit - the largest logit), and that
// logit where it is not the same.
constexpr int RECORD = DRAWS ? 4 : 3;
#define INFINITE __int_as_float(0x7f800000)
#define LOWEST (-3.0e38f)               // of a maximum that nothing has joined

// Marks for a timeline: when a token begins, and of each stage that a CTA has a part in when what it
// reads was there, and when the part was done (text_trace.py). The first thread's.
#if TRACE
#define MARK(point, there) if (thread == 0 && (there)) { trace[(long long)blockIdx.x * TRACE + marks % TRACE] = now() << 8 | (point); marks++; }
#else
#define MARK(point, there)
#endif

template <int N>
struct Constant { static constexpr int of = N; };

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
enum { GROWING, STOPPED, FULL, NOT_FINITE };

// ---- words: a value and its epoch

DEVICE void store_word(u64* at, u32 value, u32 epoch) { store_word(at, (u64)epoch << 32 | value); }
DEVICE u32 epoch_of(u64 word) { return (u32)(word >> 32); }
DEVICE float value_of(u64 word) { return __uint_as_float((u32)word); }

// Every word is there REPLICAS times, so that not all CTAs look at the same line. Lanes of a warp
// that all have the value write them, each into its own copy of all words.
DEVICE void publish(u64* copy, int at, u32 value, u32 epoch, int lane) {
    if (lane < REPLICAS) store_word(copy + at, value, epoch);
}

// ---- waits
// Whoever waits looks whether the text is given up, which another warp decides: that costs a wait one load from
// shared memory, and few instructions, of which a layer should have no more than are fetched in time.

struct WatchdogState {
    u32 gave_up;
    u32 where;  // of a wait that looked in vain
    u32 layers; // that have begun
};
struct Watchdog {
    volatile WatchdogState* state;

    DEVICE bool waits(u32 where) const {
        look_again();
        state->where = where;
        return state->gave_up == 0;
    }
};
// Until the text has ended: give it up where no layer has begun for so long, or another CTA has. One thread's. The
// status' highest bit is set, so that it is not 0 wherever that was.
template <class S>
DEVICE void run_watchdog(S& s, u32* status, u64 timeout_ns) {
    volatile WatchdogState& state = s.watchdog;
    u32 layers = state.layers;
    u64 since = now();
#pragma unroll 1
    while (*(volatile u32*)&s.ended == 0) {
        rest();
        const u32 begun = state.layers;
        const u64 time = now();
        if (begun != layers) layers = begun, since = time;
        if (time - since >= timeout_ns) atomicCAS(status, 0u, state.where | 1u << 31);
        if (*(volatile u32*)status != 0) {
            state.gave_up = 1;
            break;
        }
    }
}

// ---- the rows of a weight

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
// What each lane has of a row of KW numbers: blocks of 32 loads, as wide ones as rows are aligned.
__host__ __device__ constexpr int width_of(int kw) {
    int vector = VECTOR;
    while (kw % vector != 0) vector /= 2;
    return vector;
}
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
template <class T>
DEVICE T sum_of_warp(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
template <class T>
DEVICE T sum_up_to(T x, int lane) {  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const T before = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += before;
    }
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
    delay();
    wait_for_threads<THREADS>();
}

// ---- the ring of weights

// Wait until a tile of the ring may be filled; `open` is false once the text has ended, or a wait timed out.
template <class S>
DEVICE void wait_for_room(const S& s, u32 tile, int lane, bool& open, Watchdog watchdog) {
    delay();
#pragma unroll 1
    while (open) {
        u32 needed = tile + 1, end = 0;
        if (lane < WARPS) needed = *(volatile u32*)&s.progress[lane];
        if (lane == WARPS) end = *(volatile u32*)&s.ended;
        if (__any_sync(~0u, end)) open = false;
        if (!__any_sync(~0u, needed + SLOTS <= tile)) break;
        if (__any_sync(~0u, !watchdog.waits(2u << 28 | tile))) open = false;
    }
}
// No copy is under way when the CTA ends; `tile` is how many there were.
template <class S>
DEVICE void wait_for_copies(S& s, u32 tile) {
#pragma unroll 1
    for (u32 which = tile > SLOTS ? tile - SLOTS : 0; which < tile; which++)
        while (!has_come(&s.full[which % SLOTS], which / SLOTS & 1)) {}
}

template <class S>
struct Reader {
    S& s;
    int warp, lane;
    Watchdog watchdog;
    u32 tile;  // the first of the next stage
    u32 issued = 0;  // tiles, at least

    // A tile is there; none before it is needed: what was read of those has been computed with.
    DEVICE const Stored* wait_for(u32 which) {
        __syncwarp();
        if (lane == 0) *(volatile u32*)&s.progress[warp] = which;
        const u32 slot = which % SLOTS;
        // a barrier tells odd from even tiles alone: the one before in this slot must have been used
        if (__builtin_expect(issued <= which, false))
            while ((issued = *(volatile u32*)&s.issued) <= which)
                if (!watchdog.waits(1u << 28 | which)) return (const Stored*)s.ring[slot];
        while (!has_come(&s.full[slot], which / SLOTS & 1)) {}  // it is under way
        delay();
        return (const Stored*)s.ring[slot];
    }
};

// ---- words that a whole CTA reads

// `take(i, value)` for each of N words, of which word i lies at `place(i)`, by so many threads.
template <int N, int BY = THREADS, class Take, class Place>
DEVICE void gather(
    const u64* words, u32 epoch, int thread, Watchdog watchdog, u32 where, Take take, Place place) {
    constexpr int AT_ONCE = least(8, (N + BY - 1) / BY);
#pragma unroll 1
    for (int base = thread; base - thread < N; base += AT_ONCE * BY) {
        u64 word[AT_ONCE];
        const u64* at[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int i = base + j * BY;
            at[j] = words + place(i < N ? i : N - 1);
            word[j] = load_word(at[j]);
        }
        while (true) {
            bool all = true;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) all &= epoch_of(word[j]) == epoch;
            if (__all_sync(~0u, all) || __any_sync(~0u, !watchdog.waits(where))) break;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (epoch_of(word[j]) != epoch) word[j] = load_word(at[j]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (base + j * BY < N) take(base + j * BY, (u32)word[j]);
    }
}

// The same for n words in a row, MOST at most.
template <int MOST, class Take>
DEVICE void gather_row(const u64* words, int n, u32 epoch, int thread, Watchdog watchdog, u32 where, Take take) {
    constexpr int EACH = (MOST + THREADS - 1) / THREADS, ROUNDS = (EACH + 11) / 12, AT_ONCE = (EACH + ROUNDS - 1) / ROUNDS;
#pragma unroll 1
    for (int base = thread; base - thread < n; base += AT_ONCE * THREADS) {
        u64 word[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            word[j] = base + j * THREADS < n ? load_word(words + base + j * THREADS) : (u64)epoch << 32;
        while (true) {
            bool all = true;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) all &= epoch_of(word[j]) == epoch;
            if (__all_sync(~0u, all) || __any_sync(~0u, !watchdog.waits(where))) break;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (epoch_of(word[j]) != epoch) word[j] = load_word(words + base + j * THREADS);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
            if (base + j * THREADS < n) take(base + j * THREADS, (u32)word[j]);
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

// A head's query, key and value into `raw`, from a sequence's words, by so many threads.
template <int BY>
DEVICE void gather_head(
    float* raw, const u64* qkv, int head, u32 here, int thread, Watchdog watchdog, u32 where) {
    constexpr int OF_HEAD = E / PER;  // words
    const int kv = head / GROUP;
    gather<3 * OF_HEAD, BY>(
        qkv, here, thread, watchdog, where, [&](int i, u32 value) { unpack(value, raw + PER * i); },
        [&](int i) {
            return i < OF_HEAD ? head * OF_HEAD + i
                   : i < 2 * OF_HEAD ? (H + kv - 1) * OF_HEAD + i
                                     : (H + KV + kv - 2) * OF_HEAD + i;
        });
}

// A head's query and key, normalized and rotated, as the cache has them, pair by pair on the lanes.
struct Turned {
    float cos[LANE_PAIRS], sin[LANE_PAIRS], norms[2][LANE_PAIRS][2];
    float query[LANE_PAIRS][2], key[LANE_PAIRS][2];

    // What of them the position has, which does not wait.
    DEVICE void prepare(const Model& model, int layer, int position, int lane) {
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
    }
    DEVICE void turn(const float* raw, int which, float (&to)[LANE_PAIRS][2], int lane) {
        float a[LANE_PAIRS], b[LANE_PAIRS], squares = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = j * LANES + lane;
            const float2 both = *(const float2*)&raw[which * E + 2 * (pair < PAIRS ? pair : 0)];
            a[j] = pair < PAIRS ? both.x : 0.0f, b[j] = pair < PAIRS ? both.y : 0.0f;
            squares += a[j] * a[j] + b[j] * b[j];
        }
        const float scale = QK_NORM ? reciprocal_root(sum_of_warp(squares) * (1.0f / E) + EPS) : 1.0f;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            if (QK_NORM) a[j] *= scale * norms[which][j][0], b[j] *= scale * norms[which][j][1];
            alignas(8) float both[2] = {a[j] * cos[j] - b[j] * sin[j], b[j] * cos[j] + a[j] * sin[j]};
            if (PER == 2) unpack(packed(both[0], both[1]), both);
            to[j][0] = both[0], to[j][1] = both[1];
        }
    }
    DEVICE void turn_key(const float* raw, int lane) { turn(raw, 1, key, lane); }
    DEVICE void turn_query(const float* raw, float* rotated, int lane) {  // into `rotated`, too
        turn(raw, 0, query, lane);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = j * LANES + lane;
            if (pair < PAIRS) *(float2*)&rotated[2 * pair] = float2{query[j][0], query[j][1]};
        }
    }
    DEVICE float score() const {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) sum += query[j][0] * key[j][0] + query[j][1] * key[j][1];
        return sum_of_warp(sum) * (SCALE * LOG2E);
    }
    // The key and the value into the cache, of (max_len, E).
    DEVICE void store(Stored* keys, Stored* values, const float* raw, int position, int lane) const {
        Stored* to_key = keys + (long long)position * E;
        Stored* to_value = values + (long long)position * E;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = j * LANES + lane;
            if (pair < PAIRS)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    to_key[2 * pair + k] = as_stored(key[j][k]);
                    to_value[2 * pair + k] = as_stored(raw[2 * E + 2 * pair + k]);
                }
        }
    }
};

// What a warp has attended to: the maximum of its scores, and sums of exp2(score - maximum), alone and
// times the values, pair by pair.
struct Attended {
    float m = LOWEST, l = 0.0f, sum[LANE_PAIRS][2] = {};

    // Positions from `first` on, before `end`, of which there is one at least.
    DEVICE void add(const Positions& held, const float* rotated, int first, int end, int lane) {
        const bool seen = first + lane / 2 < end;
        const float* q = rotated + lane % 2 * HALF;
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int i = 0; i < HALF; i += 2) {
            even = fmaf(held.keys[i / HALF_VEC][i % HALF_VEC], q[i], even);
            odd = fmaf(held.keys[i / HALF_VEC][i % HALF_VEC + 1], q[i + 1], odd);
        }
        float score = even + odd;
        score += __shfl_xor_sync(~0u, score, 1);
        score = seen ? score * (SCALE * LOG2E) : LOWEST;
        const float larger = fmaxf(m, value_of_ordered(__reduce_max_sync(~0u, ordered(score))));
        const float p = seen ? power_of_2(score - larger) : 0.0f, old = power_of_2(m - larger);
        float here = 0.0f, more[LANE_PAIRS][2];
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) more[j][0] = more[j][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNK_OF_WARP / STRIPES; i++) {
            const float weight = __shfl_sync(~0u, p, 2 * (i * STRIPES + lane / WIDE));
            here += weight;
#pragma unroll
            for (int j = 0; j < LANE_PAIRS; j++) {
                more[j][0] = fmaf(weight, held.values[i][j][0], more[j][0]);
                more[j][1] = fmaf(weight, held.values[i][j][1], more[j][1]);
            }
        }
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
#pragma unroll
            for (int to = WIDE; to < LANES; to *= 2) {
                more[j][0] += __shfl_xor_sync(~0u, more[j][0], to);
                more[j][1] += __shfl_xor_sync(~0u, more[j][1], to);
            }
            sum[j][0] = more[j][0] + sum[j][0] * old, sum[j][1] = more[j][1] + sum[j][1] * old;
        }
#pragma unroll
        for (int to = WIDE; to < LANES; to *= 2) here += __shfl_xor_sync(~0u, here, to);
        l = here + l * old;
        m = larger;
    }
    // One position more, of some score; of its value the pair on this lane.
    DEVICE void add_one(float score, const float* value, int lane) {
        const float larger = fmaxf(m, score), old = power_of_2(m - larger), p = power_of_2(score - larger);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = j * LANES + lane % WIDE;
            const float2 both = *(const float2*)&value[2 * (pair < PAIRS ? pair : 0)];
            sum[j][0] = both.x * p + sum[j][0] * old, sum[j][1] = both.y * p + sum[j][1] * old;
        }
        l = p + l * old;
        m = larger;
    }
};

// Attention of a query head over the chunk of positions from `begin` on, and the newest key and value
// into the cache, of (max_len, E). `bring` leaves the head's query, key and value in `raw`; the chunk's
// output is words from `to` on. `ready` is called when what it reads is there.
template <class S, class Bring, class Ready>
DEVICE void attend(
    S& s, float* raw, const Model& model, Stored* keys, Stored* values, Bring bring, u64* to, int stride, int layer,
    int head, int begin, int chunk, int passes, int position, u32 here, int thread, Ready ready) {
    const int warp = thread / LANES, lane = thread % LANES;
    Positions held;
    held.load(keys, values, begin + warp * CHUNK_OF_WARP, position, lane);
    Turned turned;
    turned.prepare(model, layer, position, lane);
    bring();
    barrier();
    ready();
    turned.turn_query(raw, s.rotated[warp], lane);
    const bool has_newest = position - begin < chunk;  // in this chunk
    if (warp == WARPS - 1) {
        // the newest position is a part of its own
        float* part = s.partial[WARPS];
        if (has_newest) {
            turned.turn_key(raw, lane);
            const float score = turned.score();
#pragma unroll
            for (int j = 0; j < LANE_PAIRS; j++) {
                const int pair = j * LANES + lane;
                if (pair < PAIRS) *(float2*)&part[2 * pair] = *(const float2*)&raw[2 * E + 2 * pair];
            }
            if (lane == 0) part[E] = score, part[E + 1] = 1.0f;
        }
    }
    __syncwarp();
    Attended own;
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
        const int first = begin + pass * CHUNK_STEP + warp * CHUNK_OF_WARP;
        if (first >= position) break;
        if (pass > 0) held.load(keys, values, first, position, lane);
        own.add(held, s.rotated[warp], first, position, lane);
    }
    float* part = s.partial[warp];
#pragma unroll
    for (int j = 0; j < LANE_PAIRS; j++) {
        const int pair = j * LANES + lane;
        if (pair < PAIRS) *(float2*)&part[2 * pair] = float2{own.sum[j][0], own.sum[j][1]};
    }
    if (lane == 0) part[E] = own.m, part[E + 1] = own.l;
    barrier();
    // the parts
    // each word by a thread, or some of its copies
    constexpr int WORDS = E / PER, SPLIT = least(REPLICAS, pow2_to(THREADS / WORDS));
    const float(*parts)[E + 2] = s.partial;
    const int parts_there = WARPS + has_newest, own_part = lane < parts_there ? lane : 0;
    const float its_m = lane < parts_there ? parts[own_part][E] : LOWEST;
    const float m = value_of_ordered(__reduce_max_sync(~0u, ordered(its_m)));
    const float its_scale = lane < parts_there ? power_of_2(its_m - m) : 0.0f;
    float l = its_scale * parts[own_part][E + 1];
#pragma unroll
    for (int step = pow2_from(WARPS + 1) / 2; step > 0; step /= 2) l += __shfl_xor_sync(~0u, l, step);
    l = __shfl_sync(~0u, l, 0);
    float scales[WARPS + 1];
#pragma unroll
    for (int w = 0; w <= WARPS; w++) scales[w] = __shfl_sync(~0u, its_scale, w);
#pragma unroll 1
    for (int i = thread; i < WORDS * SPLIT; i += THREADS) {
        const int e = i % WORDS * PER;
        float out[PER];
#pragma unroll
        for (int k = 0; k < PER; k++) out[k] = has_newest ? scales[WARPS] * parts[WARPS][e + k] : 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
#pragma unroll
            for (int k = 0; k < PER; k++) out[k] = fmaf(scales[w], parts[w][e + k], out[k]);
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
    if (warp == WARPS - 1 && has_newest) turned.store(keys, values, raw, position, lane);
}

// ---- the best of the head's rows

// What is best: what it is chosen by and its id, and the sum of exp(logit - the largest logit). What
// tokens are chosen by and their logits are the same but where tokens are drawn.
struct Best {
    float by = LOWEST, raw = LOWEST, total = 0.0f;
    int id = V;

    DEVICE void add(float its, int its_id, float logit) {
        const float larger = fmaxf(raw, logit);
        total = total * power_of_2((raw - larger) * LOG2E) + power_of_2((logit - larger) * LOG2E);
        if (its > by) id = its_id;
        raw = larger, by = DRAWS ? fmaxf(by, its) : larger;
    }
    DEVICE void join(float its, int its_id, float logit, float its_total) {  // of equal ones the lower id
        const float larger = fmaxf(raw, logit);
        total = total * power_of_2((raw - larger) * LOG2E) + its_total * power_of_2((logit - larger) * LOG2E);
        if (its > by || (its == by && its_id < id)) id = its_id;
        raw = larger, by = DRAWS ? fmaxf(by, its) : larger;
    }
    DEVICE void join_lane(int step) {
        const float its = __shfl_xor_sync(~0u, by, step), its_total = __shfl_xor_sync(~0u, total, step);
        const int its_id = __shfl_xor_sync(~0u, id, step);
        join(its, its_id, DRAWS ? __shfl_xor_sync(~0u, raw, step) : its, its_total);
    }
    // Of a warp, but for the sum, which is each lane's part.
    DEVICE void join_warp() {
        const u32 mine = ordered(by), all = __reduce_max_sync(~0u, mine);
        id = __reduce_min_sync(~0u, mine == all ? id : V);
        by = value_of_ordered(all);
        const float larger = DRAWS ? value_of_ordered(__reduce_max_sync(~0u, ordered(raw))) : by;
        total *= power_of_2((raw - larger) * LOG2E);
        raw = larger;
    }
    DEVICE void store(float* to) const {
        to[0] = by, to[1] = __int_as_float(id), to[2] = total;
        if (RECORD > 3) to[3] = raw;
    }
    DEVICE void load(const float* from) {
        by = from[0], id = __float_as_int(from[1]), total = from[2], raw = RECORD > 3 ? from[3] : by;
    }
};

// What the best token of all CTAs' records is chosen by, and its id, the lower of equal ones; 0 where there is
// none.
DEVICE float best_of_all(const float* records, int& token, int lane) {
    float best = LOWEST;
    int id = V;
#pragma unroll
    for (int j = 0; j < (GRID + LANES - 1) / LANES; j++) {
        const int i = j * LANES + lane;
        if (i < GRID && records[RECORD * i] > best) best = records[RECORD * i], id = __float_as_int(records[RECORD * i + 1]);
    }
    const u32 mine = ordered(best), all = __reduce_max_sync(~0u, mine);
    id = __reduce_min_sync(~0u, mine == all ? id : V);
    token = id < V ? id : 0;
    return value_of_ordered(all);
}

// What makes logarithms of probabilities of logits, of all CTAs' records. By a warp.
struct Normalizer {
    float largest, log;

    DEVICE void find(const float* records, int lane) {
        constexpr int RAW = RECORD > 3 ? 3 : 0;
        float total = 0.0f;
        largest = LOWEST;
#pragma unroll 1
        for (int i = lane; i < GRID; i += LANES) largest = fmaxf(largest, records[RECORD * i + RAW]);
        largest = value_of_ordered(__reduce_max_sync(~0u, ordered(largest)));
#pragma unroll 1
        for (int i = lane; i < GRID; i += LANES)
            total += records[RECORD * i + 2] * power_of_2((records[RECORD * i + RAW] - largest) * LOG2E);
        log = log_2(sum_of_warp(total)) / LOG2E;
    }
    DEVICE u64 word_of(int token, float logit) const {
        return (u64)__float_as_uint(logit - largest - log) << 32 | (u32)token;
    }
};
