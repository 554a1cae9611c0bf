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
constexpr int RECORD = DRAWS ? 4 : 3, CHOOSING = 2;  // what choosing takes of it comes first
// Where all CTAs' records have number i of a CTA's.
__host__ __device__ constexpr int record_at(int cta, int i) {
    return i < CHOOSING ? CHOOSING * cta + i : CHOOSING * GRID + (RECORD - CHOOSING) * cta + i - CHOOSING;
}
#define INFINITE __int_as_float(0x7f800000)
#define LOWEST (-3.0e38f)               // of a maximum that nothing has joined

// Marks for a timeline: when a token begins, and of each stage of a layer that a CTA has a part in when what it
// reads was there, and when the part was done (text_trace.py). The first thread's.
#if TRACE
#define MARK(layer, point, there) if (thread == 0 && (there)) { trace[(long long)blockIdx.x * TRACE + marks % TRACE] = now() << 16 | (layer) << 4 | (point); marks++; }
#else
#define MARK(layer, point, there)
#endif

template <int N>
struct Constant { static constexpr int of = N; };
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }

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
        return (int)((long long)least(place, ctas) * (rows / unit) / ctas) * unit;
    }
    __host__ __device__ constexpr int end(int cta) const {
        const int place = (cta - offset + GRID) % GRID;
        return (int)((long long)least(place + 1, ctas) * (rows / unit) / ctas) * unit;
    }
};
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
template <class T>
DEVICE T sum_of_warp(T x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
// Of N sums, a power of two, each lane's part of OF: sum lane % N.
template <int N, int OF = LANES>
DEVICE float sum_of_row(float (&part)[N], int lane) {
#pragma unroll
    for (int n = N / 2, step = 1; n > 0; n /= 2, step *= 2)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bool upper = lane & step;
            const float mine = upper ? part[2 * i + 1] : part[2 * i], other = upper ? part[2 * i] : part[2 * i + 1];
            part[i] = mine + __shfl_xor_sync(~0u, other, step);
        }
    float sum = part[0];
#pragma unroll
    for (int step = N; step < OF; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
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

// Lanes that share a position's key, each with one part of it: as many as have 16 bytes, or 8 where that is much.
__host__ __device__ constexpr int key_lanes() {
    int lanes = 2;
    while (2 * lanes <= LANES && E % (2 * lanes * VECTOR) == 0) lanes *= 2;
    while (E / lanes > 16 && E % (lanes * VECTOR) == 0) lanes *= 2;
    return lanes;
}
constexpr int KEY_LANES = key_lanes(), KEYS_AT_ONCE = LANES / KEY_LANES, KEY_ROUNDS = CHUNK_OF_WARP / KEYS_AT_ONCE;
constexpr int PART = E / KEY_LANES, PART_VEC = width_of(PART);
constexpr int LANE_PAIRS = (PAIRS + LANES - 1) / LANES;   // pairs of each lane, of a whole head
__host__ __device__ constexpr int pow2_from(int n) { int p = 1; while (p < n) p *= 2; return p; }
__host__ __device__ constexpr int pow2_to(int n) { int p = 1; while (2 * p <= n) p *= 2; return p; }
constexpr int VALUE_VEC = LANE_PAIRS == 2 || LANE_PAIRS == 4 ? 2 * LANE_PAIRS : 2, VALUE_LOADS = 2 * LANE_PAIRS / VALUE_VEC;
constexpr int STRIPES = PAIRS >= LANES ? 1 : LANES / pow2_from(PAIRS);  // lanes that share a pair
constexpr int WIDE = LANES / STRIPES;
DEVICE int pair_of(int j, int lane) { return lane % WIDE * LANE_PAIRS + j; }  // the lane's j-th pair

struct Positions {  // of a warp: keys of KEYS_AT_ONCE positions in each round, values pair by pair
    Raw<PART_VEC> keys[KEY_ROUNDS][PART / PART_VEC];
    Raw<VALUE_VEC> values[CHUNK_OF_WARP / STRIPES][VALUE_LOADS];

    // Those from `first` on, before `position`.
    DEVICE void load(const Stored* k, const Stored* v, int first, int position, int lane) {
        const Stored* key = k + (long long)(first + lane / KEY_LANES) * E + lane % KEY_LANES * PART;
#pragma unroll
        for (int r = 0; r < KEY_ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < PART / PART_VEC; i++) {
                keys[r][i].clear();
                if (first + r * KEYS_AT_ONCE + lane / KEY_LANES < position)
                    keys[r][i].from_cache(key + r * KEYS_AT_ONCE * E + i * PART_VEC);
            }
        const Stored* value = v + (long long)(first + lane / WIDE) * E + 2 * pair_of(0, lane);
#pragma unroll
        for (int i = 0; i < CHUNK_OF_WARP / STRIPES; i++)
#pragma unroll
            for (int j = 0; j < VALUE_LOADS; j++) {
                values[i][j].clear();
                if (first + i * STRIPES + lane / WIDE < position && pair_of(j * VALUE_VEC / 2, lane) < PAIRS)
                    values[i][j].from_cache(value + i * STRIPES * E + j * VALUE_VEC);
            }
    }
};

// A head's query and, where they are wanted, its newest key and value. Of query and key a lane has the part that it
// has of each key, normalized and rotated, as the cache has them; of the value pairs.
struct Newest {
    float cos[PART / 2], sin[PART / 2];
    Raw<PART_VEC> norms[QK_NORM ? 2 : 1][PART / PART_VEC];
    float query[PART], key[PART], value[LANE_PAIRS][2];

    // What of them the position has, which does not wait.
    DEVICE void prepare(const Model& model, int layer, int position, int lane) {
        constexpr int AT_ONCE = PART % 8 == 0 ? 4 : PART % 4 == 0 ? 2 : 1;
        const long long at = (long long)position * PAIRS + lane % KEY_LANES * (PART / 2);
#pragma unroll
        for (int i = 0; i < PART / 2; i += AT_ONCE)
            load_floats<AT_ONCE>(cos + i, model.cos + at + i), load_floats<AT_ONCE>(sin + i, model.sin + at + i);
        if (QK_NORM)
#pragma unroll
            for (int which = 0; which < 2; which++)
#pragma unroll
                for (int i = 0; i < PART / PART_VEC; i++)
                    norms[which][i].from_cache(
                        model.norms + ((long long)layer * 2 + which) * E + lane % KEY_LANES * PART + i * PART_VEC);
    }
    // From a sequence's words, as soon as all have the epoch; `meanwhile` is called once they are looked at.
    template <class Meanwhile>
    DEVICE void take(
        const u64* qkv, int head, bool all, u32 epoch, Watchdog watchdog, u32 where, int lane, Meanwhile meanwhile) {
        constexpr int OF_HEAD = E / PER, OF_PART = PART / PER, OF_PAIR = 2 / PER, OF_VALUE = LANE_PAIRS * OF_PAIR;
        const int part = lane % KEY_LANES * OF_PART, kv = H + head / GROUP;
        const u64 *of_query = qkv + head * OF_HEAD + part, *of_key = qkv + kv * OF_HEAD + part;
        u64 parts[2][OF_PART], values[OF_VALUE];
#pragma unroll
        for (int i = 0; i < OF_PART; i++) parts[0][i] = 0, parts[1][i] = all ? 0 : (u64)epoch << 32;  // epochs begin at 1
#pragma unroll
        for (int i = 0; i < OF_VALUE; i++) values[i] = parts[1][0];
        auto missing = [&](u64 word) { return epoch_of(word) ^ epoch; };
        auto load = [&]() {
#pragma unroll
            for (int which = 0; which < 2; which++)
#pragma unroll
                for (int i = 0; i < OF_PART; i += 2) {
                    u64 &word = parts[which][i], &next = parts[which][i + 1];
                    load_words_if((missing(word) | missing(next)) != 0, (which ? of_key : of_query) + i, word, next);
                }
#pragma unroll
            for (int i = 0; i < OF_VALUE; i++) {
                const int pair = pair_of(i / OF_PAIR, lane);
                load_word_if(missing(values[i]) != 0, qkv + (kv + KV) * OF_HEAD + (pair < PAIRS ? pair : 0) * OF_PAIR + i % OF_PAIR, values[i]);
            }
        };
        load();
        meanwhile();
        while (true) {
            u32 differ = 0;
#pragma unroll
            for (int i = 0; i < OF_PART; i++) differ |= missing(parts[0][i]) | missing(parts[1][i]);
#pragma unroll
            for (int i = 0; i < OF_VALUE; i++) differ |= missing(values[i]);
            if (__all_sync(~0u, differ == 0) || __any_sync(~0u, !watchdog.waits(where))) break;
            load();
        }
        turn(query, parts[0], 0);
#pragma unroll
        for (int i = 0; i < PART; i++) key[i] = 0.0f;  // or its registers were taken everywhere
        if (all) turn(key, parts[1], 1);
#pragma unroll
        for (int i = 0; i < OF_VALUE; i++) unpack((u32)values[i], &value[i / OF_PAIR][i % OF_PAIR]);
    }
    // Of query and key.
    DEVICE float score() const {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int i = 0; i < PART; i += 2) even = fmaf(query[i], key[i], even), odd = fmaf(query[i + 1], key[i + 1], odd);
        return of_head(even + odd) * (SCALE * LOG2E);
    }
    // Key and value into the cache, of (max_len, E).
    DEVICE void store(Stored* keys, Stored* values, int position, int lane) const {
        keys += (long long)position * E + lane * PART, values += (long long)position * E;
        if (lane < KEY_LANES)
#pragma unroll
            for (int i = 0; i < PART; i += PER) *(u32*)(keys + i) = packed(key[i], key[i + PER - 1]);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = pair_of(j, lane);
            if (pair < PAIRS && lane < WIDE)
#pragma unroll
                for (int k = 0; k < 2; k += PER) *(u32*)(values + 2 * pair + k) = packed(value[j][k], value[j][k + PER - 1]);
        }
    }

private:
    static DEVICE float of_head(float part) {
#pragma unroll
        for (int step = 1; step < KEY_LANES; step *= 2) part += __shfl_xor_sync(~0u, part, step);
        return part;
    }
    template <int N>
    DEVICE void turn(float (&x)[PART], const u64 (&words)[N], int which) const {
#pragma unroll
        for (int i = 0; i < N; i++) unpack((u32)words[i], x + PER * i);
        if (QK_NORM) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < PART; i++) squares = fmaf(x[i], x[i], squares);
            const float scale = reciprocal_root(of_head(squares) * (1.0f / E) + EPS);
#pragma unroll
            for (int i = 0; i < PART; i++) x[i] *= scale * norms[which][i / PART_VEC][i % PART_VEC];
        }
#pragma unroll
        for (int i = 0; i < PART; i += 2) {
            alignas(8) float both[2] = {x[i] * cos[i / 2] - x[i + 1] * sin[i / 2], x[i + 1] * cos[i / 2] + x[i] * sin[i / 2]};
            if (PER == 2) unpack(packed(both[0], both[1]), both);
            x[i] = both[0], x[i + 1] = both[1];
        }
    }
};

// What a warp has attended to: the maximum of its scores, and sums of exp2(score - maximum), alone and
// times the values, pair by pair.
struct Attended {
    float m = LOWEST, l = 0.0f, sum[LANE_PAIRS][2] = {};

    // Positions from `first` on, before `end`, of which there is one at least.
    DEVICE void add(const Positions& held, const float (&query)[PART], int first, int end, int lane) {
        // a lane gets the score of one position, which has it on two
        const bool seen = first + lane % KEY_ROUNDS * KEYS_AT_ONCE + lane / KEY_LANES < end;
        float scores[KEY_ROUNDS];
#pragma unroll
        for (int r = 0; r < KEY_ROUNDS; r++) {
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int i = 0; i < PART; i += 2) {
                even = fmaf(held.keys[r][i / PART_VEC][i % PART_VEC], query[i], even);
                odd = fmaf(held.keys[r][i / PART_VEC][i % PART_VEC + 1], query[i + 1], odd);
            }
            scores[r] = even + odd;
        }
        float score = sum_of_row<KEY_ROUNDS, KEY_LANES>(scores, lane);
        score = seen ? score * (SCALE * LOG2E) : LOWEST;
        const float larger = fmaxf(m, value_of_ordered(__reduce_max_sync(~0u, ordered(score))));
        const float p = seen ? power_of_2(score - larger) : 0.0f, old = power_of_2(m - larger);
        float here = 0.0f, more[LANE_PAIRS][2];
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) more[j][0] = more[j][1] = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNK_OF_WARP / STRIPES; i++) {
            const int at = i * STRIPES + lane / WIDE;
            const float weight = __shfl_sync(~0u, p, at % KEYS_AT_ONCE * KEY_LANES + at / KEYS_AT_ONCE);
            here += weight;
#pragma unroll
            for (int j = 0; j < LANE_PAIRS; j++) {
                const Raw<VALUE_VEC>& values = held.values[i][2 * j / VALUE_VEC];
                more[j][0] = fmaf(weight, values[2 * j % VALUE_VEC], more[j][0]);
                more[j][1] = fmaf(weight, values[2 * j % VALUE_VEC + 1], more[j][1]);
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
    // One position more, of some score.
    DEVICE void add_one(float score, const float (&value)[LANE_PAIRS][2]) {
        const float larger = fmaxf(m, score), old = power_of_2(m - larger), p = power_of_2(score - larger);
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++)
            sum[j][0] = value[j][0] * p + sum[j][0] * old, sum[j][1] = value[j][1] * p + sum[j][1] * old;
        l = p + l * old;
        m = larger;
    }
};

// Attention of a query head over the chunk of positions from `begin` on, and the newest key and value, of the words
// `qkv`, into the cache, of (max_len, E); the chunk's output is words from `to` on. `ready` is called when the query is
// there.
template <class S, class Ready>
DEVICE void attend(
    S& s, const Model& model, Stored* keys, Stored* values, const u64* qkv, u64* to, int stride, int layer, int head,
    int begin, int chunk, int position, u32 here, int thread, Watchdog watchdog, u32 where, Ready ready) {
    const int warp = thread / LANES, lane = thread % LANES;
    const bool has_newest = warp == WARPS - 1 && position - begin < chunk;  // the last warp has the fewest others
    Newest newest;
    newest.prepare(model, layer, position, lane);
    Positions held;
    newest.take(qkv, head, has_newest, here, watchdog, where, lane,
                [&]() { held.load(keys, values, begin + warp * CHUNK_OF_WARP, position, lane); });
    ready();
    const float score = has_newest ? newest.score() : 0.0f;
    Attended own;
#pragma unroll 1
    for (int pass = 0; pass < chunk; pass += CHUNK_STEP) {
        const int first = begin + pass + warp * CHUNK_OF_WARP;
        if (first >= position) break;
        if (pass > 0) held.load(keys, values, first, position, lane);
        own.add(held, newest.query, first, position, lane);
    }
    if (has_newest) own.add_one(score, newest.value);
    float* part = s.partial[warp];
#pragma unroll
    for (int j = 0; j < LANE_PAIRS; j++) {
        const int pair = pair_of(j, lane);
        if (pair < PAIRS && lane < WIDE) *(float2*)&part[2 * pair] = float2{own.sum[j][0], own.sum[j][1]};
    }
    if (lane == 0) part[E] = own.m, part[E + 1] = own.l;
    barrier();
    // the parts
    // each word by a thread, or some of its copies
    constexpr int WORDS = E / PER, SPLIT = least(REPLICAS, pow2_to(THREADS / WORDS));
    const float(*parts)[E + 2] = s.partial;
    const float its_m = parts[lane % WARPS][E];
    const float m = value_of_ordered(__reduce_max_sync(~0u, ordered(its_m)));
    const float its_scale = power_of_2(its_m - m);
    float l = its_scale * parts[lane % WARPS][E + 1];
#pragma unroll
    for (int step = WARPS / 2; step > 0; step /= 2) l += __shfl_xor_sync(~0u, l, step);
    float scales[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) scales[w] = __shfl_sync(~0u, its_scale, w);
#pragma unroll 1
    for (int i = thread; i < WORDS * SPLIT; i += THREADS) {
        const int e = i % WORDS * PER;
        float out[PER];
#pragma unroll
        for (int k = 0; k < PER; k++) out[k] = 0.0f;
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
    if (has_newest) newest.store(keys, values, position, lane);
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
        if (i < GRID && records[CHOOSING * i] > best) best = records[CHOOSING * i], id = __float_as_int(records[CHOOSING * i + 1]);
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
        for (int i = lane; i < GRID; i += LANES) largest = fmaxf(largest, records[record_at(i, RAW)]);
        largest = value_of_ordered(__reduce_max_sync(~0u, ordered(largest)));
#pragma unroll 1
        for (int i = lane; i < GRID; i += LANES)
            total += records[record_at(i, 2)] * power_of_2((records[record_at(i, RAW)] - largest) * LOG2E);
        log = log_2(sum_of_warp(total)) / LOG2E;
    }
    DEVICE u64 word_of(int token, float logit) const {
        return (u64)__float_as_uint(logit - largest - log) << 32 | (u32)token;
    }
};
