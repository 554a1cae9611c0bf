// One launch that writes many tokens of several sequences at once; see text.cu for how CTAs hand
// numbers on, and weights come.
//
// The launch has one or more groups of GRID CTAs, each with up to SEQUENCES sequences, which it writes
// by itself: more groups read the weights more often, and each waits for fewer CTAs. Where a group is a
// single CTA its words are in shared memory, and so near that a small model is written sooner by it than by
// all: what takes time is then how fast a multiprocessor reads the weights.
//
// Products are on tensor cores: 16 rows of a weight, 8 columns of which each is a sequence. The warps
// of a CTA share the columns of a weight's 16 rows; their sums meet in shared memory, in a fixed
// order. A column does not depend on the others, so that a sequence's numbers are the same with any
// others. One that has ended stays where it is until all have, and what it still does is not read.
//
// Shapes (macros) as in text.cu; D, H E and F in multiples of 32, numbers of 16 bits. ALONE: whether a
// warp attends alone, for where there are many sequences, or all of a CTA together.

struct Memory {
    Stored *keys, *values;  // (LAYERS, slots, KV, max_len, E)
    u64* words;             // of each group REPLICAS of those of the stages, as in `Words`
    u32* status;            // 0, or where a wait timed out
    u64* written;           // (sequences, max_len) on the host: tokens and logprobs; all bits set before
    int* ending;            // (sequences, 2) on the host: how many tokens, and what ended the text
    const int* stop_ids;    // (sequences, LANES), -1 where there is none
    const int* sequences;   // (sequences, SEQUENCE_INTS): slot, last token, its position, how many tokens;
                            // where tokens are drawn, how many there are, and what they are drawn by
    u64* sums;              // of each group SUMS_OF_GROUP, all zero
    const float* uniforms;  // (slots, max_len), from 0 to below 1
    int* history;           // (slots, max_len): the texts' tokens, where there is a penalty
    float* logits;          // (sequences, V), whatever they are
};
constexpr int SEQUENCE_INTS = 10;

constexpr int R = SEQUENCES, BLOCKS = R / 8;  // of columns
constexpr int OWN = R / WARPS;                // sequences of a warp, when tokens are chosen: every WARPS-th
static_assert(R % 8 == 0 && R % WARPS == 0 && PER == 2 && D % 32 == 0 && Q % 32 == 0 && F % 32 == 0, "shapes");

// Where the words of a stage lie: those of a sequence follow those of another.
struct Words {
    static constexpr int qkv = 0;
    static constexpr int mid = qkv + R * N_QKV / 2;  // x after attention
    static constexpr int hidden = mid + R * D / 2;
    static constexpr int x = hidden + R * F / 2;
    static constexpr int best = x + R * D / 2;       // of two tokens in turn, RECORD of each CTA
    static constexpr int drawn = best + 2 * R * RECORD * GRID;  // 3 of each CTA
    static constexpr int chosen = drawn + R * 3 * GRID;
    static constexpr int attention = chosen + R * 2;
    static constexpr int all = attention + R * WORDS_OF_CHUNK;  // with one chunk
};

// ---- the ring of weights: tiles of 16 rows and some columns

constexpr int QKV_UNIT = 2, X_UNIT = 2;
constexpr int QKV_GROUP = group_of(N_QKV, QKV_UNIT), X_GROUP = group_of(D, X_UNIT);
constexpr int QKV_CTAS = ctas_of(N_QKV, QKV_UNIT, QKV_GROUP), X_CTAS = ctas_of(D, X_UNIT, X_GROUP);
constexpr int GATE_UP_CTAS = ctas_of(2 * F, 4, 4);
constexpr int GATE_UP_OFFSET = QKV_CTAS + X_CTAS, ATTENTION_OFFSET = (GATE_UP_OFFSET + GATE_UP_CTAS) % GRID;
__host__ __device__ constexpr Rows rows_of(int stage) {
    switch (stage) {
        case QKV: return Rows(D, N_QKV, QKV_UNIT, 16, QKV_CTAS, 0);
        case OUT: return Rows(Q, D, X_UNIT, 16, X_CTAS, QKV_CTAS);
        case GATE_UP: return Rows(D, 2 * F, 4, 16, GATE_UP_CTAS, GATE_UP_OFFSET);
        case DOWN: return Rows(F, D, X_UNIT, 16, X_CTAS, QKV_CTAS);
        default: return Rows(D, V, 1, 16, GRID, 0);
    }
}
__constant__ constexpr Rows ROWS[STAGES] = {
    rows_of(QKV), rows_of(OUT), rows_of(GATE_UP), rows_of(DOWN), rows_of(HEAD)};

// Rows of 64 bytes more than a multiple of 128: eight lanes read two of them without a conflict.
__host__ __device__ constexpr int pitch_of(int columns) { return columns + (32 - columns % 64 + 64) % 64; }
// How a stage's products are shared: rows of a CTA in blocks of 16, of which `at_once` are computed at
// once, each by `parts` warps; columns of a block in `tiles`.
struct Columns {
    int of_tile, tiles, pitch, blocks, parts, at_once;
    __host__ __device__ constexpr Columns(Rows row, bool head) : of_tile(0), tiles(0), pitch(0), blocks(0), parts(0), at_once(0) {
        const int kw = row.kw;
        // a single CTA's tiles are whole copies: of narrow rows it would have too many to issue
        const int most_columns = GRID == 1 ? SLOT_BYTES / 32 / 32 * 32 : (SLOT_BYTES / 32 - 32) / 32 * 32;
        tiles = (kw + most_columns - 1) / most_columns;
        of_tile = ((kw + tiles - 1) / tiles + 31) / 32 * 32;
        pitch = GRID == 1 ? of_tile : pitch_of(of_tile);
        blocks = ((row.rows / row.unit + row.ctas - 1) / row.ctas * row.unit + 15) / 16;
        parts = head ? 1 : most(1, WARPS / pow2_from(blocks));
        at_once = head ? 1 : WARPS / parts;
    }
};
__host__ __device__ constexpr Columns columns_of(int stage) { return Columns(rows_of(stage), stage == HEAD); }
__constant__ constexpr Columns COLUMNS[STAGES] = {
    columns_of(QKV), columns_of(OUT), columns_of(GATE_UP), columns_of(DOWN), columns_of(HEAD)};
__host__ __device__ constexpr int sums_of(int stage) { return columns_of(stage).blocks * columns_of(stage).parts; }
constexpr int SUMS = most(WARPS, most(most(sums_of(QKV), sums_of(OUT)), most(sums_of(GATE_UP), sums_of(DOWN))));
constexpr int X_ROWS = (D / X_UNIT + X_CTAS - 1) / X_CTAS * X_UNIT;  // of a CTA at most

struct Shared {
    alignas(128) unsigned char ring[SLOTS][SLOT_BYTES];
    alignas(16) Stored narrow[R][pitch_of(D)];            // what qkv, gate_up and head read
    alignas(16) Stored wide[R][pitch_of(Q > F ? Q : F)];  // what out_proj and down read
    alignas(16) float raw[ALONE ? WARPS : 1][3 * E];      // what attention reads: a query, its key and value
    alignas(16) float rotated[WARPS][E];
    alignas(16) float partial[ALONE ? 1 : WARPS + 1][E + 2];
    alignas(16) float sums[SUMS * 16][R];                 // of the warps' parts of products
    float kept[2][X_ROWS][R];                             // this CTA's rows of x, before and after attention
    float rstd[R];
    float best[WARPS][R][RECORD], records[R][RECORD * GRID];  // of the warps, of the CTAs
#if DRAWS
    DrawnSequences drawn;
#endif
    alignas(8) u64 full[SLOTS];
    int first[STAGES], count[STAGES];                     // rows
    int slot[R], token[R], position[R], ending[R];
    u32 progress[WARPS];                                  // no tile before it is needed
    u32 issued;                                           // tiles whose copies are under way, or there
    u32 ended;
#if GRID == 1
    u64 words[Words::all];
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");
using Consumer = Reader<Shared>;

// The producer: tiles in the order in which they are read, as far ahead as there is room: of the blocks
// that are computed at once first all first columns.
DEVICE void produce(Shared& s, const Model& model, int n_tokens, int lane, Patience patience) {
    u32 tile = 0;
    bool open = true;  // until all texts have ended
    const int steps = n_tokens * (4 * LAYERS + 1);
    int of_token = 0;
#pragma unroll 1
    for (int step = 0; step < steps && open; step++) {
        const int layer = of_token / 4, stage = of_token == 4 * LAYERS ? HEAD : of_token % 4;
        of_token = of_token == 4 * LAYERS ? 0 : of_token + 1;
        const Stored* weight = stage == QKV ? model.qkv : stage == OUT ? model.out
                               : stage == GATE_UP ? model.gate_up : stage == DOWN ? model.down : model.head;
        const int kw = ROWS[stage].kw, rows = s.count[stage], blocks = (rows + 15) / 16;
        const int of_tile = COLUMNS[stage].of_tile, across = COLUMNS[stage].tiles, pitch = COLUMNS[stage].pitch;
        const int at_once = COLUMNS[stage].at_once;
        weight += ((stage == HEAD ? 0 : (long long)layer * ROWS[stage].rows) + s.first[stage]) * kw;
#pragma unroll 1
        for (int i = 0; i < blocks * across && open; i++) {
            const int begin = i / (at_once * across) * at_once, together = least(at_once, blocks - begin);
            const int in_all = i - begin * across, block = begin + in_all % together, column = in_all / together * of_tile;
            wait_for_room(s, tile, lane, open, patience);
            if (!open) break;
            const int there = least(16, rows - 16 * block);
            const u32 bytes = least(of_tile, kw - column) * sizeof(Stored), slot = tile % SLOTS;
            if (lane == 0) expect(&s.full[slot], there * bytes);
            __syncwarp();
            const Stored* from = weight + (long long)16 * block * kw;
            if (across == 1 && pitch == kw) {
                if (lane == 0) copy(s.ring[slot], from, there * bytes, &s.full[slot]);
            } else if (lane < there) {
                copy(s.ring[slot] + lane * pitch * sizeof(Stored), from + lane * kw + column, bytes, &s.full[slot]);
            }
            if (lane == 0) *(volatile u32*)&s.issued = tile + 1;
            tile++;
        }
    }
    wait_for_copies(s, tile);
}

// 16 rows of a tile times the sequences' x, of the columns of blocks of 32 from `part` on, of `parts`.
// Which k of an mma is which column is free, as long as both sides agree: each lane's stand side by side.
struct Products {
    float even[BLOCKS][4] = {}, odd[BLOCKS][4] = {};

    DEVICE void add(
        const Stored* tile, int pitch, const Stored* x, int x_pitch, int columns, int part, int parts, int lane) {
        const int row = lane / 4, at = lane % 4 * 8;
        const Stored *lower = tile + row * pitch + at, *upper = lower + 8 * pitch, *b = x + row * x_pitch + at;
#pragma unroll 2
        for (int k = part * 32; k < columns; k += parts * 32) {
            const uint4 u = *(const uint4*)(lower + k), v = *(const uint4*)(upper + k);
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                const uint4 y = *(const uint4*)(b + 8 * i * x_pitch + k);
                multiply(even[i], u.x, v.x, u.y, v.y, y.x, y.y);
                multiply(odd[i], u.z, v.z, u.w, v.w, y.z, y.w);
            }
        }
    }
    // Of rows lane / 4 (k < 2) and of that eight on, sequences 8 i + 2 (lane % 4) and the next.
    DEVICE float of(int i, int k) const { return even[i][k] + odd[i][k]; }
};

// The 1 / rms of each sequence's x.
DEVICE void find_rstd(Shared& s, int warp, int lane) {
#pragma unroll 1
    for (int r = warp; r < R; r += WARPS) {
        float squares = 0.0f;
#pragma unroll 4
        for (int i = 2 * lane; i < D; i += 2 * LANES) {
            Raw<2> x;
            x.from_shared(s.narrow[r] + i);
            squares = fmaf(x[0], x[0], fmaf(x[1], x[1], squares));
        }
        const float rstd = rstd_of(squares);
        if (lane == 0) s.rstd[r] = rstd;
    }
}

// The sum of a row's parts, in their order.
template <int STAGE>
DEVICE float sum_of(const Shared& s, int row, int sequence) {
    constexpr int PARTS = columns_of(STAGE).parts;
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; part++) sum += s.sums[(row / 16 * PARTS + part) * 16 + row % 16][sequence];
    return sum;
}

// A stage's products: `fetch` brings what it reads into `from`; `sum_of` gives them, afterwards.
template <int STAGE, bool NORM, class Fetch>
DEVICE void run_stage(Consumer& c, int rows, const Stored* from, int from_pitch, Fetch fetch) {
    constexpr Columns COLUMN = columns_of(STAGE);
    constexpr int KW = rows_of(STAGE).kw, PARTS = COLUMN.parts, AT_ONCE = COLUMN.at_once;
    const int part = c.warp % PARTS, blocks = (rows + 15) / 16, own = c.warp / PARTS;
    const u32 base = c.tile;
    // of the tiles that may come before this stage has used one
    const bool ahead = own < blocks && own < SLOTS;
    const Stored* tile = nullptr;
    if (ahead) tile = c.wait_for(base + own);
    c.tile += blocks * COLUMN.tiles;
    fetch();
    barrier();
#pragma unroll 1
    for (int block = own, begin = 0; block < blocks; block += AT_ONCE, begin += AT_ONCE) {
        Products products;
        const int together = least(AT_ONCE, blocks - begin);
        u32 which = base + begin * COLUMN.tiles + own;
#pragma unroll 1
        for (int column = 0; column < KW; column += COLUMN.of_tile, which += together) {
            if (begin > 0 || column > 0 || !ahead) tile = c.wait_for(which);
            products.add(tile, COLUMN.pitch, from + column, from_pitch, least(COLUMN.of_tile, KW - column), part,
                         PARTS, c.lane);
        }
        float(*to)[R] = c.s.sums + (block * PARTS + part) * 16 + c.lane / 4;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) to[k / 2 * 8][8 * i + c.lane % 4 * 2 + k % 2] = products.of(i, k);
    }
    if (NORM) find_rstd(c.s, c.warp, c.lane);
    __syncwarp();
    if (c.lane == 0) *(volatile u32*)&c.s.progress[c.warp] = c.tile;
    barrier();
}

// Words 0 to `count` of each of n sequences, each by a thread, or some of its copies: `value(word,
// sequence, of the first copy, at)` gives it and sets where in `words` it lies.
template <class Value>
DEVICE void publish_all(u64* words, int stride, int count, int n, u32 epoch, int thread, Value value) {
    const int all = count * n;
    int split = REPLICAS;
    while (split > 1 && all * split > THREADS) split /= 2;
#pragma unroll 1
    for (int i = thread; i < all * split; i += THREADS) {
        const int word = i % all, copy = i / all;
        int at;
        const u32 of = value(word % count, word / count, copy == 0, at);
#pragma unroll 1
        for (int r = copy; r < REPLICAS; r += split) store_word(words + (long long)r * stride + at, of, epoch);
    }
}

// `attend` (parts.cu) by one warp.
DEVICE void attend_alone(
    Shared& s, const Model& model, Stored* keys, Stored* values, const u64* qkv, u64* to, int stride, int layer,
    int head, int begin, int chunk, int position, u32 here, int warp, int lane, Patience patience, u32 where) {
    constexpr int AHEAD = E <= 16 ? 4 : 2;  // how many are under way: small ones take less time than they wait
    const int end = least(position, begin + chunk);
    Positions held[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) held[i].load(keys, values, begin + i * CHUNK_OF_WARP, end, lane);
    Turned turned;
    turned.prepare(model, layer, position, lane);
    float* raw = s.raw[warp];
    __syncwarp();  // all are done with the head before
    gather_head<LANES>(raw, qkv, head, here, lane, patience, where);
    __syncwarp();
    turned.turn(raw, s.rotated[warp], lane);
    __syncwarp();
    Attended all;
#pragma unroll 1
    for (int first = begin; first < end; first += AHEAD * CHUNK_OF_WARP) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int own = first + i * CHUNK_OF_WARP;
            if (own < end) all.add(held[i], s.rotated[warp], own, end, lane);
            held[i].load(keys, values, own + AHEAD * CHUNK_OF_WARP, end, lane);
        }
    }
    const bool has_newest = position - begin < chunk;
    if (has_newest) {
        all.add_one(turned.score(), raw + 2 * E, lane);
        turned.store(keys, values, raw, position, lane);
    }
    const u32 lse = __float_as_uint(all.m + log_2(all.l));
#pragma unroll 1
    for (int r = lane / WIDE; r < REPLICAS; r += STRIPES) {
        u64* copy = to + (long long)r * stride;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = j * LANES + lane % WIDE;
            if (pair < PAIRS)
                store_word(copy + head * PAIRS + pair, packed(quotient(all.sum[j][0], all.l), quotient(all.sum[j][1], all.l)), here);
        }
        if (lane % WIDE == 0) store_word(copy + Q / 2 + head, lse, here);
    }
}

// What attention gives each sequence, of its chunks, into `to`.
DEVICE void gather_attention(
    const u64* words, int n, int chunk, const int* positions, u32 epoch, int thread, Patience patience, u32 where,
    Stored* to, int pitch) {
    constexpr int N = Q / 2, EACH = least(5, (R * N + THREADS - 1) / THREADS);
#pragma unroll 1
    for (int base = thread; base - thread < n * N; base += EACH * THREADS) {
        float m[EACH], l[EACH], sum[EACH][2];
        int element[EACH], sequence[EACH], chunks[EACH], most_chunks = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = least(base + i * THREADS, n * N - 1);
            sequence[i] = at / N, element[i] = at % N;
            chunks[i] = positions[sequence[i]] / chunk + 1;
            most_chunks = most(most_chunks, chunks[i]);
            m[i] = LOWEST, l[i] = sum[i][0] = sum[i][1] = 0.0f;
        }
        most_chunks = (int)__reduce_max_sync(~0u, (u32)most_chunks);
#pragma unroll 1
        for (int c = 0; c < most_chunks; c++) {
            u64 out[EACH], lse[EACH];
            const u64* of[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                of[i] = words + ((long long)least(c, chunks[i] - 1) * R + sequence[i]) * WORDS_OF_CHUNK;
                out[i] = load_word(of[i] + element[i]), lse[i] = load_word(of[i] + N + element[i] * 2 / E);
            }
            while (true) {
                bool all = true;
#pragma unroll
                for (int i = 0; i < EACH; i++) all &= epoch_of(out[i]) == epoch && epoch_of(lse[i]) == epoch;
                if (__all_sync(~0u, all) || __any_sync(~0u, !patience.waits(where))) break;
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    if (epoch_of(out[i]) != epoch) out[i] = load_word(of[i] + element[i]);
                    if (epoch_of(lse[i]) != epoch) lse[i] = load_word(of[i] + N + element[i] * 2 / E);
                }
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const float one = c < chunks[i] ? value_of(lse[i]) : LOWEST, larger = fmaxf(m[i], one);
                const float old = power_of_2(m[i] - larger), p = c < chunks[i] ? power_of_2(one - larger) : 0.0f;
                alignas(8) float both[2];
                unpack((u32)out[i], both);
                sum[i][0] = sum[i][0] * old + both[0] * p, sum[i][1] = sum[i][1] * old + both[1] * p;
                l[i] = l[i] * old + p;
                m[i] = larger;
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (base + i * THREADS < n * N)
                *(u32*)&to[sequence[i] * pitch + 2 * element[i]] = packed(quotient(sum[i][0], l[i]), quotient(sum[i][1], l[i]));
    }
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__((WARPS + 1) * LANES, 1) write_texts(
    const Model* model_at, const Memory* memory_at, int all_n, int n_slots, int max_len, int n_tokens, int passes,
    int stride, u32 epoch, u64 timeout_ns
) {
    // the sequences of a group are neighbours
    const int groups = gridDim.x / GRID, group = blockIdx.x / GRID;
    const int first_sequence = group * all_n / groups, n = (group + 1) * all_n / groups - first_sequence;
    if (n == 0) return;

    SHARED_MEMORY(bytes);
    Shared& s = *(Shared*)bytes;
    const Model model = *model_at;
    Memory memory = *memory_at;
#if GRID == 1
    memory.words = s.words;
    for (int i = threadIdx.x; i < Words::all; i += (WARPS + 1) * LANES) s.words[i] = 0;  // no epoch
#else
    memory.words += (long long)group * REPLICAS * stride;
#endif
    memory.written += (long long)first_sequence * max_len, memory.ending += 2 * first_sequence;
    memory.stop_ids += first_sequence * LANES, memory.sequences += SEQUENCE_INTS * first_sequence;
    const int cta = blockIdx.x % GRID, thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES;
    Patience patience{memory.status, timeout_ns};

    if (thread < SLOTS) make_barrier(&s.full[thread]);
    if (thread < WARPS) s.progress[thread] = 0;
    if (thread < STAGES) {
        s.first[thread] = ROWS[thread].first(cta);
        s.count[thread] = ROWS[thread].end(cta) - ROWS[thread].first(cta);
    }
    if (thread < n) {
        const int* sequence = memory.sequences + SEQUENCE_INTS * thread;
        s.slot[thread] = sequence[0], s.token[thread] = sequence[1], s.position[thread] = sequence[2];
        s.ending[thread] = GROWING;
#if DRAWS
        s.drawn.how[thread] = {__int_as_float(sequence[6]), __int_as_float(sequence[7]), __int_as_float(sequence[8]),
                               __int_as_float(sequence[9]), sequence[5]};
#endif
    }
    if (thread == 0) s.issued = s.ended = 0;
#if DRAWS
    if (thread == 0) s.drawn.logits = memory.logits + (long long)first_sequence * V + ROWS[HEAD].first(cta);
#endif
    show_to_copies();
    __syncthreads();

    if (warp == WARPS) {
        produce(s, model, n_tokens, lane, patience);
        return;
    }

    const int chunk = passes * CHUNK_STEP;
    const u64* words = memory.words + (long long)(cta % REPLICAS) * stride;  // that this CTA reads
    u64* copy = memory.words + (long long)(lane % REPLICAS) * stride;        // that this lane writes
    Consumer consumer{s, warp, lane, patience, 0};
    const int qkv_rows = s.count[QKV], qkv_first = s.first[QKV], x_rows = s.count[OUT], x_first = s.first[OUT];
    const int hidden_rows = s.count[GATE_UP], hidden_first = s.first[GATE_UP] / 2;
    const int head_rows = s.count[HEAD], head_first = s.first[HEAD];
    int stop_id[OWN], limit[OWN], count[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int own = warp + i * WARPS < n ? warp + i * WARPS : 0;
        stop_id[i] = memory.stop_ids[own * LANES + lane], limit[i] = memory.sequences[SEQUENCE_INTS * own + 3];
        count[i] = 0;
    }
    bool all_ended = false;
#if DRAWS
    // which tokens each text has
#pragma unroll 1
    for (int r = warp; r < n; r += WARPS) {
        if (s.drawn.how[r].penalty == 1.0f) continue;
        for (int i = lane; i < SEEN_WORDS; i += LANES) s.drawn.seen[r][i] = 0;
        __syncwarp();
        const int* history = memory.history + (long long)s.slot[r] * max_len;
#pragma unroll 1
        for (int i = lane; i <= s.position[r]; i += LANES) see(s.drawn.seen[r], history[i], head_first, head_rows);
    }
    u64* sums = memory.sums + (long long)group * SUMS_OF_GROUP;
    auto uniform = [&](int r) {
        const int* sequence = memory.sequences + SEQUENCE_INTS * r;
        // of how many tokens there were, and have come since
        return memory.uniforms[(long long)sequence[0] * max_len + sequence[4] + s.position[r] - sequence[2]];
    };
    barrier();
#endif

#pragma unroll 1
    for (int t = 0; t < n_tokens && !all_ended; t++) {
        u32 here = epoch + (u32)t * LAYERS;  // of a layer's words
        int longest = 0;
        for (int r = 0; r < n; r++) longest = most(longest, s.position[r]);
        const int tasks = (longest / chunk + 1) * n * H;

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++, here++) {
            const u32 where = 3u << 28 | (u32)layer << 4;
            auto take_x = [&](int i, u32 value) { *(u32*)&s.narrow[i / (D / 2)][i % (D / 2) * 2] = value; };
            run_stage<QKV, true>(consumer, qkv_rows, s.narrow[0], pitch_of(D), [&]() {
                if (layer == 0) {
#pragma unroll 4
                    for (int i = thread; i < n * D / 2; i += THREADS) {
                        const int r = i / (D / 2), at = i % (D / 2) * 2;
                        *(u32*)&s.narrow[r][at] = *(const u32*)(model.embedding + (long long)s.token[r] * D + at);
                    }
                    for (int i = thread; i < n * x_rows; i += THREADS)
                        s.kept[0][i / n][i % n] = as_float(model.embedding[(long long)s.token[i % n] * D + x_first + i / n]);
                } else if (qkv_rows > 0) {
                    gather_row<R * D / 2>(words + Words::x, n * D / 2, here - 1, thread, patience, where, take_x);
                }
            });
            publish_all(memory.words + Words::qkv, stride, qkv_rows / 2, n, here, thread,
                        [&](int word, int r, bool, int& at) {
                            at = r * (N_QKV / 2) + qkv_first / 2 + word;
                            return packed(sum_of<QKV>(s, 2 * word, r) * s.rstd[r], sum_of<QKV>(s, 2 * word + 1, r) * s.rstd[r]);
                        });

            // attention
            const int place = (cta - ATTENTION_OFFSET + GRID) % GRID;
            bool another = false;
#pragma unroll 1
            for (int task = ALONE ? warp * GRID + place : place; task < tasks; task += ALONE ? WARPS * GRID : GRID) {
                const int of_chunk = task / (n * H), r = task % (n * H) / H, head = task % H;
                const int begin = of_chunk * chunk, position = s.position[r];
                if (begin > position) continue;
                const long long of_cache = (((long long)layer * n_slots + s.slot[r]) * KV + head / GROUP) * max_len * E;
                const u64* qkv = words + Words::qkv + r * (N_QKV / 2);
                u64* to = memory.words + Words::attention + ((long long)of_chunk * R + r) * WORDS_OF_CHUNK;
                if constexpr (ALONE) {
                    attend_alone(s, model, memory.keys + of_cache, memory.values + of_cache, qkv, to, stride, layer, head,
                                 begin, chunk, position, here, warp, lane, patience, where | 1);
                } else {
                    if (another) barrier();
                    another = true;
                    attend(s, s.raw[0], model, memory.keys + of_cache, memory.values + of_cache,
                           [&]() { gather_head<THREADS>(s.raw[0], qkv, head, here, thread, patience, where | 1); }, to,
                           stride, layer, head, begin, chunk, passes, position, here, thread, []() {});
                }
            }

            run_stage<OUT, false>(consumer, x_rows, s.wide[0], pitch_of(Q > F ? Q : F), [&]() {
                if (x_rows > 0)
                    gather_attention(words + Words::attention, n, chunk, s.position, here, thread, patience, where | 2,
                                     s.wide[0], pitch_of(Q > F ? Q : F));
            });
            auto add_to_x = [&](auto sum, int from, int words_at) {
                publish_all(memory.words + words_at, stride, x_rows / 2, n, here, thread,
                            [&](int word, int r, bool first_copy, int& at) {
                                at = r * (D / 2) + x_first / 2 + word;
                                float x[2];
#pragma unroll
                                for (int k = 0; k < 2; k++) {
                                    x[k] = s.kept[from][2 * word + k][r] + sum(2 * word + k, r);
                                    if (first_copy) s.kept[1 - from][2 * word + k][r] = x[k];
                                }
                                return packed(x[0], x[1]);
                            });
            };
            add_to_x([&](int row, int r) { return sum_of<OUT>(s, row, r); }, 0, Words::mid);

            run_stage<GATE_UP, true>(consumer, hidden_rows, s.narrow[0], pitch_of(D), [&]() {
                if (hidden_rows > 0) gather_row<R * D / 2>(words + Words::mid, n * D / 2, here, thread, patience, where | 3, take_x);
            });
            publish_all(memory.words + Words::hidden, stride, hidden_rows / 4, n, here, thread,
                        [&](int word, int r, bool, int& at) {
                            at = r * (F / 2) + hidden_first / 2 + word;
                            float hidden[2];
#pragma unroll
                            for (int k = 0; k < 2; k++) {
                                const float gate = sum_of<GATE_UP>(s, 4 * word + 2 * k, r) * s.rstd[r];
                                const float up = sum_of<GATE_UP>(s, 4 * word + 2 * k + 1, r) * s.rstd[r];
                                hidden[k] = quotient(gate, 1.0f + power_of_2(-LOG2E * gate)) * up;
                            }
                            return packed(hidden[0], hidden[1]);
                        });

            run_stage<DOWN, false>(consumer, x_rows, s.wide[0], pitch_of(Q > F ? Q : F), [&]() {
                if (x_rows > 0)
                    gather_row<R * F / 2>(words + Words::hidden, n * F / 2, here, thread, patience, where | 4,
                                [&](int i, u32 value) { *(u32*)&s.wide[i / (F / 2)][i % (F / 2) * 2] = value; });
            });
            add_to_x([&](int row, int r) { return sum_of<DOWN>(s, row, r); }, 1, Words::x);
        }

        // head: of each lane the best of its rows for its columns
        Best best[2 * BLOCKS];
        {
            constexpr Columns COLUMN = columns_of(HEAD);
            const int blocks = (head_rows + 15) / 16, row = lane / 4;
            const u32 base = consumer.tile;
            const bool ahead = warp < blocks && warp * COLUMN.tiles < SLOTS;
            const Stored* tile = ahead ? consumer.wait_for(base + warp * COLUMN.tiles) : nullptr;
            consumer.tile += blocks * COLUMN.tiles;
            gather_row<R * D / 2>(words + Words::x, n * D / 2, here - 1, thread, patience, 4u << 28,
                        [&](int i, u32 value) { *(u32*)&s.narrow[i / (D / 2)][i % (D / 2) * 2] = value; });
            barrier();
            find_rstd(s, warp, lane);
            barrier();
            float rstd[2 * BLOCKS];
#pragma unroll
            for (int k = 0; k < 2 * BLOCKS; k++) rstd[k] = s.rstd[k / 2 * 8 + lane % 4 * 2 + k % 2];
            auto add_logit = [&](int row, int k, float logit) {
                if (row >= head_rows) return;
                if (!(logit == logit)) logit = INFINITE;  // a NaN is the best
#if DRAWS
                const int r = k / 2 * 8 + lane % 4 * 2 + k % 2;
                if (r < n) best[k].add(s.drawn.keep(r, row, logit), head_first + row, logit);
#else
                best[k].add(logit, head_first + row, logit);
#endif
            };
#pragma unroll 1
            for (int block = warp; block < blocks; block += WARPS) {
                Products products;
#pragma unroll 1
                for (int j = 0; j < COLUMN.tiles; j++) {
                    if (block > warp || j > 0 || !ahead) tile = consumer.wait_for(base + block * COLUMN.tiles + j);
                    const int column = j * COLUMN.of_tile;
                    products.add(tile, COLUMN.pitch, s.narrow[0] + column, pitch_of(D), least(COLUMN.of_tile, D - column),
                                 0, 1, lane);
                }
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const int column = 2 * i + k % 2;
                        add_logit(16 * block + row + k / 2 * 8, column, products.of(i, k) * rstd[column]);
                    }
            }
            __syncwarp();
            if (lane == 0) *(volatile u32*)&s.progress[warp] = consumer.tile;
        }
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; k++) {
#pragma unroll
            for (int step = 4; step < LANES; step *= 2) best[k].join_lane(step);
            if (lane < 4) best[k].store(s.best[warp][k / 2 * 8 + 2 * lane + k % 2]);
        }
        barrier();
        const u32 of_best = epoch + (u32)t;
        const int records = Words::best + (of_best & 1) * R * RECORD * GRID;
#pragma unroll 1
        for (int r = warp; r < n; r += WARPS) {
            Best of_cta;
            of_cta.load(s.best[lane % WARPS][r]);
#pragma unroll
            for (int step = 1; step < WARPS; step *= 2) of_cta.join_lane(step);
            float record[RECORD];
            of_cta.store(record);
            const int at = records + (r * GRID + cta) * RECORD;
#pragma unroll
            for (int i = 0; i < RECORD; i++) publish(copy, at + i, __float_as_uint(record[i]), of_best, lane);
            if (of_cta.id < V)  // whichever is the next token, its row is in the L2
#pragma unroll 1
                for (int i = lane * 64; i < D; i += LANES * 64) prefetch(model.embedding + (long long)of_cta.id * D + i);
        }
        gather_row<R * RECORD * GRID>(words + records, n * RECORD * GRID, of_best, thread, patience, 4u << 28 | 1,
                                      [&](int i, u32 value) { s.records[0][i] = __uint_as_float(value); });
        barrier();
        int token[OWN];
        float logit[OWN];
        Normalizer normalizer[OWN];
        bool finite[OWN];
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const int r = warp + own * WARPS;
            if (r >= n) continue;
            logit[own] = best_of_all(s.records[r], token[own], lane);
            finite[own] = logit[own] < INFINITE && logit[own] > LOWEST;
            if (cta == 0) normalizer[own].find(s.records[r], lane);
#if DRAWS
            s.drawn.best[r] = logit[own], s.drawn.id[r] = finite[own] && s.ending[r] == GROWING ? token[own] : V;
#endif
        }
#if DRAWS
        barrier();
        // the records of what is best have been read: there is room for those of what is kept
        draw_all(s.drawn, (u32*)s.records[0], sums, words, copy, Words::drawn, Words::chosen, uniform, n, head_first,
                 head_rows, of_best, cta, thread, patience, 5u << 28);
#endif
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const int r = warp + own * WARPS;
            if (r >= n || s.ending[r] != GROWING) continue;
#if DRAWS
            token[own] = (int)s.drawn.chosen[2 * r], logit[own] = __uint_as_float(s.drawn.chosen[2 * r + 1]);
            token[own] = (u32)token[own] < V ? token[own] : 0;  // where a wait has timed out
#endif
            int ending = GROWING;
            if (!finite[own]) {
                ending = NOT_FINITE;
            } else if (__any_sync(~0u, stop_id[own] == token[own])) {
                ending = STOPPED;
            } else {
                if (cta == 0 && lane == 0)
                    store_to_host(memory.written + (long long)r * max_len + count[own],
                                  normalizer[own].word_of(token[own], logit[own]));
                count[own]++;
                if (count[own] == limit[own]) ending = FULL;
#if DRAWS
                if (s.drawn.how[r].penalty != 1.0f && lane == 0) {
                    see(s.drawn.seen[r], token[own], head_first, head_rows);
                    const int next = s.position[r] + 1;
                    if (cta == 0 && next < max_len) memory.history[(long long)s.slot[r] * max_len + next] = token[own];
                }
#endif
            }
            __syncwarp();
            if (lane == 0) {
                s.ending[r] = ending;
                if (ending == GROWING) s.token[r] = token[own], s.position[r]++;
            }
        }
        barrier();
        all_ended = true;
        for (int r = 0; r < n; r++) all_ended &= s.ending[r] != GROWING;
    }
    if (thread == 0) *(volatile u32*)&s.ended = 1;
    if (cta == 0 && lane == 0)
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const int r = warp + own * WARPS;
            if (r >= n) break;
            memory.ending[2 * r] = count[own];
            memory.ending[2 * r + 1] = *(volatile u32*)memory.status != 0 ? -1 : s.ending[r];
        }
}
