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
    alignas(16) float partial[WARPS][E + 2];          // of attention
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
constexpr int AHEAD_WORDS = 96;  // of a lane's part of a group's rows, that are loaded before x is there, at most

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

// Each piece of a row of KW numbers that its lanes load at once, from POS on, VEC numbers each: as wide ones as the row
// has; of the last one some lanes may have none. AT of a lane's words come before.
template <int POS_, int VEC_, int AT_, int KW>
struct Piece {
    static constexpr int VEC = VEC_, AT = AT_, WORDS = Raw<VEC>::WORDS;

    DEVICE static Raw<VEC> load(const Stored* row, int lane) {
        Raw<VEC> raw;
        if (KW - POS_ < LANES) raw.clear();
        if (KW - POS_ >= LANES || lane < KW - POS_) raw.from_shared(row + POS_ + lane * VEC);
        return raw;
    }
};
template <int KW, int POS = 0, int AT = 0, int VEC = width_of(KW), class Do>
DEVICE void each_piece(Do act) {
    if constexpr (POS < KW) {
        if constexpr (VEC > 1 && KW - POS < LANES * VEC) {
            each_piece<KW, POS, AT, VEC / 2>(act);
        } else {
            act(Piece<POS, VEC, AT, KW>());
            each_piece<KW, POS + LANES * VEC, AT + Raw<VEC>::WORDS, VEC>(act);
        }
    }
}
// Whether all of a row is computed with piece by piece, as registers allow, or what is not ahead in a loop.
__host__ __device__ constexpr bool in_pieces(int kw) { return kw <= 1024; }
// Words of each of N rows that a lane loads before x is there: whole pieces.
__host__ __device__ constexpr int words_ahead(int kw, int n) {
    int pos = 0, words = 0;
    for (int vec = width_of(kw); pos < kw; ) {
        if (vec > 1 && kw - pos < LANES * vec) {
            if (!in_pieces(kw)) break;
            vec /= 2;
            continue;
        }
        const int more = vec < PER_WORD ? 1 : vec / PER_WORD;
        if (n * (words + more) > AHEAD_WORDS) break;
        words += more, pos += LANES * vec;
    }
    return words;
}

// Those of a group as words, where they are `there`; N as above, on every so-manieth lane.
template <int N, int EVERY = 1>
DEVICE void publish_rows(u64* words, int stride, int at, float sum, bool there, u32 epoch, int lane) {
    static_assert(N * EVERY * REPLICAS <= LANES && N >= PER, "a lane for each copy");
    const float next = PER == 2 ? __shfl_xor_sync(~0u, sum, EVERY) : sum;
    const int row = lane / EVERY % N, copy = lane / (N * EVERY);
    if (there && lane % EVERY == 0 && row % PER == 0 && copy < REPLICAS)
        store_word(words + (long long)copy * stride + at + row / PER, packed(sum, next), epoch);
}

template <int N>
DEVICE Constant<N> of_vector(const Raw<N>&) { return {}; }

// A stage's products: `fetch` brings what it reads into `from`, and `body(row, sum)` takes each group's first row
// and, lane by lane, the sum of the row lane % N from there on, N the group's rows up to a power of two; of a norm
// they are normalized. What does not need the input comes before `fetch`.
template <int STAGE, bool NORM, class Fetch, class Body>
DEVICE void run_stage(Consumer& c, int rows, const Stored* from, Fetch fetch, Body body) {
    constexpr Rows R = rows_of(STAGE);
    constexpr int KW = R.kw, N = R.group, GROUPS = R.tile / N, AHEAD = words_ahead(KW, N);
    const int groups = (rows + N - 1) / N;
    u32 which = c.tile + c.warp / GROUPS;
    int in_tile = c.warp % GROUPS, group = c.warp;
    const Stored* tile = nullptr;
    u32 w[N][AHEAD > 0 ? AHEAD : 1];
    auto row_at = [&](int r) { return tile + (in_tile * N + (group * N + r < rows ? r : 0)) * KW; };
    auto load = [&]() {
#pragma unroll
        for (int r = 0; r < N; r++) {
            const Stored* row = row_at(r);
            if constexpr (AHEAD > 0)
                each_piece<KW>([&](auto piece) {
                    using P = decltype(piece);
                    constexpr bool IS_AHEAD = P::AT + P::WORDS <= AHEAD;
                    if constexpr (IS_AHEAD) {
                        const auto raw = P::load(row, c.lane);
#pragma unroll
                        for (int i = 0; i < P::WORDS; i++) w[r][P::AT + i] = raw.of[i];
                    }
                });
        }
    };
    // of the tiles that may come before this stage has used one
    const bool ahead = group < groups && which < c.tile + SLOTS;
    if (ahead) {
        tile = c.wait_for(which), load();
    } else {
        // Registers that might be read before they are written are taken from the kernel's begin on, throughout its loops.
#pragma unroll
        for (int r = 0; r < N; r++)
#pragma unroll
            for (int i = 0; i < (AHEAD > 0 ? AHEAD : 1); i++) w[r][i] = 0;
    }
    c.tile += (rows + R.tile - 1) / R.tile;
    fetch();
    barrier();
    if (group < groups) {
        if (!ahead) tile = c.wait_for(which), load();
#pragma unroll 1
        while (true) {
            float sums[pow2_from(N)][2] = {}, squares[2] = {0.0f, 0.0f};
            const Stored* at[N];
#pragma unroll
            for (int r = 0; r < N; r++) at[r] = row_at(r);
            auto add = [&](const auto& x, auto row) {
                constexpr int VEC = decltype(of_vector(x))::of;
                float here[VEC];
#pragma unroll
                for (int k = 0; k < VEC; k++) here[k] = x[k];
                if constexpr (NORM)
#pragma unroll
                    for (int k = 0; k < VEC; k++) squares[k % 2] = fmaf(here[k], here[k], squares[k % 2]);
#pragma unroll
                for (int r = 0; r < N; r++) {
                    const auto weights = row(r);
#pragma unroll
                    for (int k = 0; k < VEC; k++) sums[r][k % 2] = fmaf(weights[k], here[k], sums[r][k % 2]);
                }
            };
            each_piece<KW>([&](auto piece) {
                using P = decltype(piece);
                constexpr bool IS_AHEAD = P::AT + P::WORDS <= AHEAD;
                if constexpr (IS_AHEAD || in_pieces(KW))
                    add(P::load(from, c.lane), [&](int r) {
                        Raw<P::VEC> raw;
                        if constexpr (IS_AHEAD)
#pragma unroll
                            for (int i = 0; i < P::WORDS; i++) raw.of[i] = w[r][P::AT + i];
                        else
                            raw = P::load(at[r], c.lane);
                        return raw;
                    });
            });
            if constexpr (!in_pieces(KW)) {
                constexpr int VEC = width_of(KW);
#pragma unroll 2
                for (int i = AHEAD / Raw<VEC>::WORDS * LANES * VEC + c.lane * VEC; i < KW; i += LANES * VEC) {
                    Raw<VEC> x;
                    x.from_shared(from + i);
                    add(x, [&](int r) {
                        Raw<VEC> raw;
                        raw.from_shared(at[r] + i);
                        return raw;
                    });
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
            float part[pow2_from(N)];
#pragma unroll
            for (int r = 0; r < pow2_from(N); r++) part[r] = sums[r][0] + sums[r][1];
            const float sum = sum_of_row(part, c.lane), scale = NORM ? rstd_of(squares[0] + squares[1]) : 1.0f;
            body(first, sum * scale);
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
    // Rows that begin in the same banks: odd ones take each two 32 numbers in the other order, and so does the second
    // column of x, which is theirs.
    constexpr bool TURNS = D % 64 == 0;
    const bool odd_row = TURNS && lane / 4 % 2;
    float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll 3
    for (int k = 0; k < D; k += 32) {
        const int at = (odd_row ? k ^ 32 : k) + lane % 4 * 8;
        const uint4 a = *(const uint4*)(lower + at);
        uint4 b = {0, 0, 0, 0}, y = {0, 0, 0, 0};
        if (SIXTEEN) b = *(const uint4*)(upper + at);
        if (lane < (TURNS ? 8 : 4)) y = *(const uint4*)(x + at);
        multiply(even, a.x, b.x, a.y, b.y, y.x, y.y);
        multiply(odd, a.z, b.z, a.w, b.w, y.z, y.w);
    }
    return odd_row ? float2{even[1] + odd[1], even[3] + odd[3]} : float2{even[0] + odd[0], even[2] + odd[2]};
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
    constexpr int N = Q / PER, EACH = least(4, (N + THREADS - 1) / THREADS), CHUNKS_AT_ONCE = 2;
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
#pragma unroll 1
        for (int c = 0; c < chunks; c += CHUNKS_AT_ONCE) {
            // of several chunks at once, of which some may not be there; one alone needs no normalizer
            u64 out[CHUNKS_AT_ONCE][EACH], lse[CHUNKS_AT_ONCE][EACH];
#pragma unroll
            for (int k = 0; k < CHUNKS_AT_ONCE; k++)
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    out[k][i] = c + k < chunks ? 0 : (u64)epoch << 32;  // epochs begin at 1
                    lse[k][i] = c + k < chunks && chunks > 1 ? 0 : (u64)epoch << 32;
                }
            while (true) {
#pragma unroll
                for (int k = 0; k < CHUNKS_AT_ONCE; k++)
#pragma unroll
                    for (int i = 0; i < EACH; i++) {
                        const u64* from = words + (long long)(c + k) * WORDS_OF_CHUNK;
                        load_word_if(epoch_of(out[k][i]) != epoch, from + element[i], out[k][i]);
                        load_word_if(epoch_of(lse[k][i]) != epoch, from + head[i], lse[k][i]);
                    }
                u32 differ = 0;
#pragma unroll
                for (int k = 0; k < CHUNKS_AT_ONCE; k++)
#pragma unroll
                    for (int i = 0; i < EACH; i++) differ |= epoch_of(out[k][i]) ^ epoch | epoch_of(lse[k][i]) ^ epoch;
                if (__all_sync(~0u, differ == 0) || __any_sync(~0u, !watchdog.waits(where))) break;
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float larger = m[i], of_chunk[CHUNKS_AT_ONCE];
#pragma unroll
                for (int k = 0; k < CHUNKS_AT_ONCE; k++) {
                    of_chunk[k] = c + k < chunks ? value_of(lse[k][i]) : LOWEST;
                    larger = fmaxf(larger, of_chunk[k]);
                }
                const float old = power_of_2(m[i] - larger);
                l[i] *= old, m[i] = larger;
#pragma unroll
                for (int e = 0; e < PER; e++) sum[i][e] *= old;
#pragma unroll
                for (int k = 0; k < CHUNKS_AT_ONCE; k++) {
                    const float p = power_of_2(of_chunk[k] - larger);
                    alignas(8) float numbers[PER];
                    unpack((u32)out[k][i], numbers);
#pragma unroll
                    for (int e = 0; e < PER; e++) sum[i][e] = fmaf(numbers[e], p, sum[i][e]);
                    l[i] += p;
                }
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
    const int chunk = passes * CHUNK_STEP;
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
        MARK(LAYERS, 0, true)
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
                MARK(layer, 1, qkv_rows > 0)
            }, [&](int first, float sum) {
                constexpr int N = pow2_from(QKV_GROUP);
                publish_rows<N>(memory.words, stride, Words::qkv + (qkv_first + first) / PER, sum,
                                lane % N < QKV_GROUP && first + lane % N < qkv_rows, here, lane);
            });
            MARK(layer, 2, qkv_rows > 0)

            // attention
            const int first_task = (cta - ATTENTION_OFFSET + GRID) % GRID;
#pragma unroll 1
            for (int task = first_task; task < active * H; task += GRID) {
                const int of_chunk = task / H, head = task % H, begin = of_chunk * chunk;
                const long long of_cache = (((long long)layer * n_slots + slot) * KV + head / GROUP) * max_len * E;
                if (task != first_task) barrier();
                attend(s, model, memory.keys + of_cache, memory.values + of_cache, words + Words::qkv,
                       memory.words + Words::attention + (long long)of_chunk * WORDS_OF_CHUNK, stride, layer, head,
                       begin, chunk, position, here, thread, watchdog, where | 1, [&]() { MARK(layer, 3, true) });
                MARK(layer, 4, true)
            }

            auto add_to_x = [&](int first, float sum, int to) {
                constexpr int N = pow2_from(X_GROUP);
                const int row = first + lane % N;
                const bool there = lane % N < X_GROUP && row < x_rows;
                sum += s.kept[there ? row : first];
                __syncwarp();
                if (there && lane < N) s.kept[row] = sum;
                publish_rows<N>(memory.words, stride, to + (x_first + first) / PER, sum, there, here, lane);
            };
            run_stage<OUT, false>(consumer, x_rows, s.wide, [&]() {
                if (x_rows > 0)
                    gather_attention(words + Words::attention, active, here, thread, watchdog, where | 2, s.wide);
                MARK(layer, 5, x_rows > 0)
            }, [&](int first, float sum) { add_to_x(first, sum, Words::mid); });
            MARK(layer, 6, x_rows > 0)

            run_stage<GATE_UP, true>(consumer, hidden_rows, s.narrow, [&]() {
                if (hidden_rows > 0) gather<D / PER>(words + Words::mid, here, thread, watchdog, where | 3, take_x, straight);
                MARK(layer, 7, hidden_rows > 0)
            }, [&](int first, float sum) {
                // rows are gates and ups in turn
                const float up = __shfl_xor_sync(~0u, sum, 1);
                const float hidden = quotient(sum, 1.0f + power_of_2(-LOG2E * sum)) * up;
                publish_rows<2, 2>(memory.words, stride, Words::hidden + (hidden_first + first / 2) / PER, hidden, true, here, lane);
            });
            MARK(layer, 8, hidden_rows > 0)

            run_stage<DOWN, false>(consumer, x_rows, s.wide, [&]() {
                if (x_rows > 0)
                    gather<F / PER>(words + Words::hidden, here, thread, watchdog, where | 4,
                                    [&](int i, u32 value) { *(u32*)&s.wide[PER * i] = value; }, straight);
                MARK(layer, 9, x_rows > 0)
            }, [&](int first, float sum) { add_to_x(first, sum, Words::x); });
            MARK(layer, 10, x_rows > 0)
        }

        // of each lane the best of its rows of the head, and the sum of exp(logit - best)
        Best own;
        auto fetch_x = [&]() {
            gather<D / PER>(words + Words::x, here - 1, thread, watchdog, 4u << 28,
                      [&](int i, u32 value) { *(u32*)&s.narrow[PER * i] = value; }, straight);
            MARK(LAYERS, 11, true)
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
        if constexpr (HEAD_BY_TENSOR_CORES)
            run_head(consumer, head_rows, fetch_x, add_logit);
        else
            run_stage<HEAD, true>(consumer, head_rows, s.narrow, fetch_x, [&](int first, float logit) {
                if (lane < HEAD_GROUP) add_logit(first + lane, logit);
            });
        MARK(LAYERS, 12, true)
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
            for (int i = 0; i < RECORD; i++) publish(copy, records + record_at(cta, i), __float_as_uint(record[i]), of_best, lane);
            if (own.id < V)  // whichever is the next token, its row is in the L2
#pragma unroll 1
                for (int i = lane * 64; i < D; i += LANES * 64)
                    prefetch(model.embedding + (long long)own.id * D + i);
        }
        gather<RECORD * GRID>(words + records, of_best, thread, watchdog, 4u << 28 | 1,
                              [&](int i, u32 value) { s.records[i] = __uint_as_float(value); }, straight);
        barrier();
        MARK(LAYERS, 13, true)
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
