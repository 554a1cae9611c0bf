// One launch that writes many tokens of one or several sequences, whose numbers have 16 bits and whose
// products are on tensor cores; see text.cu for how CTAs hand numbers on, and weights come.
//
// The launch has one or more groups of GRID CTAs, each with up to SEQUENCES sequences, which it writes
// by itself: more groups read the weights more often, and each waits for fewer CTAs.
//
// A product is of 16 rows of a weight and columns of which each is a sequence. The warps of a CTA share the
// numbers of a row: each takes its part of what the stage reads straight out of the words, as the tensor cores
// want it, so that nothing is between a word and its product; the warps' sums meet in shared memory, in a fixed
// order. A column does not depend on the others, so that a sequence's numbers are the same with any
// others. One that has ended stays where it is until all have, and what it still does is not read.
//
// Shapes (macros) as in text.cu; D, H E and F in multiples of 32. ALONE: whether a warp attends alone, for
// where there are many sequences, or all of a CTA together. CHUNKS: of a sequence's context, at most.

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
constexpr long long FETCHED_BYTES = 24 << 20;

constexpr int R = SEQUENCES, BLOCKS = (R + 7) / 8;  // of eight columns, some of which one sequence leaves empty
constexpr int OWN = (R + WARPS - 1) / WARPS;        // sequences of a warp, when tokens are chosen: every WARPS-th
static_assert((R == 1 || R % 8 == 0) && PER == 2 && D % 32 == 0 && Q % 32 == 0 && F % 32 == 0, "shapes");

// Where the words of a stage lie: those of a sequence follow those of another. All but the last few are read in
// pairs, and lie so.
struct Words {
    static constexpr int qkv = 0;
    static constexpr int mid = qkv + R * N_QKV / 2;  // x after attention
    static constexpr int hidden = mid + R * D / 2;
    static constexpr int x = hidden + R * F / 2;
    static constexpr int best = x + R * D / 2;       // of two tokens in turn, RECORD of each CTA
    static constexpr int drawn = best + 2 * R * RECORD * GRID;  // 3 of each CTA
    static constexpr int chosen = drawn + R * 3 * GRID;
    static constexpr int attention = (chosen + R * 2 + 1) / 2 * 2;
};

// ---- the ring of weights: tiles of 16 rows and some columns
// Which k of an mma is which column of the weight is free, as long as both sides agree: of each 32 columns, a
// unit, a lane has eight that stand side by side, those from lane % 4 * 8 on; of the weight's row lane / 4 and
// that eight on, of sequence lane / 4 of each block. Weights lie so in memory (`tiled` in text.py): of each 16 rows,
// a block, each unit's 512 numbers: lane by lane those of the first four columns, two of a row and two of the other
// in turn, and then those of the last four.

constexpr int OF_UNIT = 512;  // numbers
// How a stage's blocks lie: `ctas` CTAs from `offset` on have them, in tiles of `of_tile` units. No more CTAs have
// some than there are blocks: whoever has none does not read what they read.
// A warp takes `of_warp` units of a block, `at_once` of them at once, which lie in one tile.
struct Tiles {
    int rows, blocks, units, ctas, offset, of_warp, at_once, tiles, of_tile;
    __host__ __device__ constexpr Tiles(int rows, int columns, int offset)
        : rows(rows), blocks((rows + 15) / 16), units(columns / 32), ctas(least(blocks, GRID)), offset(offset % GRID),
          of_warp((units + WARPS - 1) / WARPS), at_once(least(of_warp, 16 / BLOCKS)), tiles(0), of_tile(0) {
        while (of_warp % at_once != 0) at_once--;
        const int warps = (units + at_once - 1) / at_once, most_warps = most(TILE_UNITS / at_once, 1);
        tiles = (warps + most_warps - 1) / most_warps;
        of_tile = least((warps + tiles - 1) / tiles * at_once, units);
    }
    __host__ __device__ constexpr int first(int cta) const {  // block
        return least((cta - offset + GRID) % GRID, ctas) * blocks / ctas;
    }
    __host__ __device__ constexpr int end(int cta) const {
        return least((cta - offset + GRID) % GRID + 1, ctas) * blocks / ctas;
    }
    __host__ __device__ constexpr int of_cta() const { return (blocks + ctas - 1) / ctas; }  // blocks at most
};
constexpr Tiles OF_QKV(N_QKV, D, 0), OF_OUT(D, Q, OF_QKV.ctas), OF_GATE_UP(2 * F, D, OF_QKV.ctas + OF_OUT.ctas);
constexpr Tiles OF_DOWN(D, F, OF_QKV.ctas), OF_HEAD(V, D, 0);  // out_proj and down have the same rows of x
constexpr int ATTENTION_OFFSET = (OF_GATE_UP.offset + OF_GATE_UP.ctas) % GRID;
__host__ __device__ constexpr const Tiles& tiles_of(int stage) {
    return stage == QKV ? OF_QKV : stage == OUT ? OF_OUT : stage == GATE_UP ? OF_GATE_UP : stage == DOWN ? OF_DOWN : OF_HEAD;
}
__constant__ constexpr Tiles TILES[STAGES] = {OF_QKV, OF_OUT, OF_GATE_UP, OF_DOWN, OF_HEAD};
static_assert(TILE_UNITS * OF_UNIT * sizeof(Stored) == SLOT_BYTES, "a tile is a slot");
__host__ __device__ constexpr int divisor_of(int a, int b, int most) {
    while (a % most != 0 || b % most != 0) most--;
    return most;
}
// Sums of one stage may be read while those of the next are written.
constexpr int EVEN_BLOCKS = most(OF_QKV.of_cta(), OF_GATE_UP.of_cta()), ODD_BLOCKS = OF_OUT.of_cta();
constexpr int QKV_WORDS = 8 * OF_QKV.of_cta(), X_WORDS = 8 * OF_OUT.of_cta(), HIDDEN_WORDS = 4 * OF_GATE_UP.of_cta();
constexpr int SUMS_PITCH = 20;  // of a sequence's 16 rows: lanes write them without a conflict
__host__ __device__ constexpr int pitch_of(int columns) { return columns + (32 - columns % 64 + 64) % 64; }  // likewise

struct Shared {
    alignas(128) unsigned char ring[SLOTS][SLOT_BYTES];
    alignas(16) Stored narrow[R][pitch_of(D)];            // what head reads
    alignas(16) float partial[ALONE ? 1 : WARPS][E + 2];  // of attention
    alignas(16) float sums[EVEN_BLOCKS + ODD_BLOCKS][WARPS][R][SUMS_PITCH];  // of the warps' parts of products
    float squares[2][WARPS][R];                           // and of x
    float best[WARPS * 8][R][RECORD], records[R][RECORD * GRID];  // of the rows of the warps' blocks, of the CTAs
#if DRAWS
    DrawnSequences drawn;
#endif
    alignas(8) u64 full[SLOTS];
    int first[STAGES], count[STAGES];                     // rows
    int slot[R], token[R], position[R], ending[R];
    WatchdogState watchdog;
    u32 progress[WARPS];                                  // no tile before it is needed
    u32 issued;                                           // tiles whose copies are under way, or there
    u32 ended;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "shared memory");
using Consumer = Reader<Shared>;

// The producer: tiles in the order in which they are read, block by block, as far ahead as there is room.
DEVICE void produce(Shared& s, const Model& model, int n_tokens, int lane, Watchdog watchdog) {
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
        const int units = TILES[stage].units, of_tile = TILES[stage].of_tile, blocks = (s.count[stage] + 15) / 16;
        const int before = (stage == HEAD ? 0 : layer * TILES[stage].blocks) + s.first[stage] / 16;
        const Stored* from = weight + (long long)before * units * OF_UNIT;
#pragma unroll 1
        for (int block = 0; block < blocks && open; block++)
#pragma unroll 1
            for (int unit = 0; unit < units; unit += of_tile) {
                wait_for_room(s, tile, lane, open, watchdog);
                if (!open) break;
                const int there = least(of_tile, units - unit) * OF_UNIT;
                if (lane == 0) {
                    const u32 slot = tile % SLOTS;
                    expect(&s.full[slot], there * sizeof(Stored));
                    copy(s.ring[slot], from, there * sizeof(Stored), &s.full[slot]);
                    *(volatile u32*)&s.issued = tile + 1;
                }
                from += there;
                tile++;
            }
    }
    wait_for_copies(s, tile);
}

// ---- products of 16 rows of a tile and the sequences' x
struct Sums {
    float even[BLOCKS][4] = {}, odd[BLOCKS][4] = {};

    // Of row lane / 4 (k < 2) or that eight on, sequence 8 i + 2 (lane % 4) or the next.
    DEVICE float of(int i, int k) const { return even[i][k] + odd[i][k]; }
};
struct Products : Sums {
    DEVICE void add(const uint4 (&w)[2], const uint4 (&x)[BLOCKS]) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            multiply(even[i], w[0].x, w[0].y, w[0].z, w[0].w, x[i].x, x[i].y);
            multiply(odd[i], w[1].x, w[1].y, w[1].z, w[1].w, x[i].z, x[i].w);
        }
    }
};

// Sums of x's squares, the products of columns with themselves: that of sequence c of a block is `of` on lane
// 4 c + c / 2.
struct Squares : Sums {
    DEVICE void add(const uint4 (&x)[BLOCKS]) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            multiply(even[i], x[i].x, 0, x[i].y, 0, x[i].x, x[i].y);
            multiply(odd[i], x[i].z, 0, x[i].w, 0, x[i].z, x[i].w);
        }
    }
};
DEVICE float rstd_of_sum(float squares) { return reciprocal_root(fmaf(squares, 1.0f / D, EPS)); }

// Of units from `first` on what `at(unit, block)` points to, four words of each lane that has a sequence, as the
// tensor cores want them; zeros on the others, and of units from END on.
template <int END, int N, class At>
DEVICE void take_units(
    uint4 (&x)[N][BLOCKS], int first, u32 has, u32 epoch, Watchdog watchdog, u32 where, At at) {
    constexpr int AT_ONCE = most(1, least(N, 8 / BLOCKS));  // so many are under way
#pragma unroll
    for (int base = 0; base < N; base += AT_ONCE) {
        u64 word[AT_ONCE][BLOCKS][4];
        auto load = [&](int j, int i, int k, bool wanted) {
            const u64* from = at(first + base + j, i) + k;
            load_words_if(wanted, from, word[j][i][k], word[j][i][k + 1]);
        };
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) word[j][i][k] = (u64)epoch << 32;
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < 4; k += 2)
                    if (base + j < N) load(j, i, k, (END % N == 0 || first + base + j < END) && (has >> i & 1));
        while (true) {
            u32 differ = 0;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++) differ |= epoch_of(word[j][i][k]) ^ epoch;
            if (__all_sync(~0u, differ == 0) || __any_sync(~0u, !watchdog.waits(where))) break;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                    for (int k = 0; k < 4; k += 2)
                        if (base + j < N)
                            load(j, i, k, (epoch_of(word[j][i][k]) ^ epoch | epoch_of(word[j][i][k + 1]) ^ epoch) != 0);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
                if (base + j < N)
                    x[base + j][i] = uint4{(u32)word[j][i][0], (u32)word[j][i][1], (u32)word[j][i][2], (u32)word[j][i][3]};
    }
}

// The same of what attention gives, of `words`, chunks of sequences: each sequence's chunks joined, of which
// this lane's have `chunks`.
template <int N>
DEVICE void take_attention(
    uint4 (&x)[N][BLOCKS], int first, u32 has, const int (&chunks)[BLOCKS], u32 epoch, Watchdog watchdog, u32 where,
    const u64* words, int lane) {
    constexpr int END = Q / 32;
    launder(lane), launder(words);
    auto of_chunk = [&](int chunk, int i) { return words + ((long long)chunk * R + 8 * i + lane / 4) * WORDS_OF_CHUNK; };
    int most_chunks = 1;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
        if (has >> i & 1) most_chunks = most(most_chunks, chunks[i]);
    most_chunks = (int)__reduce_max_sync(~0u, (u32)most_chunks);
    if (CHUNKS == 1 || most_chunks == 1) {
        take_units<END>(x, first, has, epoch, watchdog, where,
                        [&](int unit, int i) { return of_chunk(0, i) + unit * 16 + lane % 4 * 4; });
        return;
    }
    if constexpr (CHUNKS > 1) {
        constexpr int AT_ONCE = most(1, least(N, 4 / BLOCKS)), JOINED = 2;  // units, and their chunks, under way
#pragma unroll
        for (int base = 0; base < N; base += AT_ONCE) {
            float m[AT_ONCE][BLOCKS], l[AT_ONCE][BLOCKS], sum[AT_ONCE][BLOCKS][8];
            auto each = [&](auto act) {  // of those that there are
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                    for (int i = 0; i < BLOCKS; i++)
                        if (base + j < N) act(j, i);
            };
            each([&](int j, int i) {
                m[j][i] = LOWEST, l[j][i] = 0.0f;
#pragma unroll
                for (int k = 0; k < 8; k++) sum[j][i][k] = 0.0f;
            });
#pragma unroll 1
            for (int c = 0; c < most_chunks; c += JOINED) {
                u64 word[JOINED][AT_ONCE][BLOCKS][5];
                auto is_there = [&](int k, int j, int i) {
                    return (END % N == 0 || first + base + j < END) && (has >> i & 1) && c + k < chunks[i];
                };
                auto missing = [&](u64 one) { return epoch_of(one) ^ epoch; };
                auto load = [&](int k, int j, int i) {
                    const int column = (first + base + j) * 32 + lane % 4 * 8;
                    const u64 *of = of_chunk(c + k, i), *from = of + column / 2;
                    u64(&to)[5] = word[k][j][i];
                    load_words_if((missing(to[0]) | missing(to[1])) != 0, from, to[0], to[1]);
                    load_words_if((missing(to[2]) | missing(to[3])) != 0, from + 2, to[2], to[3]);
                    load_word_if(missing(to[4]) != 0, of + Q / 2 + column / E, to[4]);
                };
#pragma unroll
                for (int k = 0; k < JOINED; k++)
                    each([&](int j, int i) {
#pragma unroll
                        for (int of = 0; of < 5; of++) word[k][j][i][of] = is_there(k, j, i) ? 0 : (u64)epoch << 32;  // epochs begin at 1
                        load(k, j, i);
                    });
                while (true) {
                    u32 differ = 0;
#pragma unroll
                    for (int k = 0; k < JOINED; k++)
                        each([&](int j, int i) {
#pragma unroll
                            for (int of = 0; of < 5; of++) differ |= missing(word[k][j][i][of]);
                        });
                    if (__all_sync(~0u, differ == 0) || __any_sync(~0u, !watchdog.waits(where))) break;
#pragma unroll
                    for (int k = 0; k < JOINED; k++) each([&](int j, int i) { load(k, j, i); });
                }
                each([&](int j, int i) {
                    float one[JOINED], larger = m[j][i];
#pragma unroll
                    for (int k = 0; k < JOINED; k++) {
                        one[k] = is_there(k, j, i) ? value_of(word[k][j][i][4]) : LOWEST;
                        larger = fmaxf(larger, one[k]);
                    }
                    const float old = power_of_2(m[j][i] - larger);
                    l[j][i] *= old, m[j][i] = larger;
#pragma unroll
                    for (int of = 0; of < 8; of++) sum[j][i][of] *= old;
#pragma unroll
                    for (int k = 0; k < JOINED; k++) {
                        const float p = is_there(k, j, i) ? power_of_2(one[k] - larger) : 0.0f;
                        l[j][i] += p;
#pragma unroll
                        for (int of = 0; of < 4; of++) {
                            alignas(8) float both[2];
                            unpack((u32)word[k][j][i][of], both);
                            sum[j][i][2 * of] = fmaf(both[0], p, sum[j][i][2 * of]);
                            sum[j][i][2 * of + 1] = fmaf(both[1], p, sum[j][i][2 * of + 1]);
                        }
                    }
                });
            }
            each([&](int j, int i) {
                const float scale = l[j][i] > 0.0f ? quotient(1.0f, l[j][i]) : 0.0f;
                u32 both[4];
#pragma unroll
                for (int k = 0; k < 4; k++) both[k] = packed(sum[j][i][2 * k] * scale, sum[j][i][2 * k + 1] * scale);
                x[base + j][i] = uint4{both[0], both[1], both[2], both[3]};
            });
        }
    }
}

// A stage's products: `take(x, first)` brings the warp's units from `first` on. Afterwards `s.sums` has the
// warps' sums of each block from sums_from(STAGE) on, and, of a norm, `s.squares`.
__host__ __device__ constexpr int sums_from(int stage) { return stage == OUT || stage == DOWN ? EVEN_BLOCKS : 0; }
template <int STAGE, bool NORM, class Take>
DEVICE void run_stage(Consumer& c, int rows, Take take) {
    constexpr Tiles T = tiles_of(STAGE);
    constexpr int N = T.at_once;
    constexpr bool ALL = N == T.of_warp, AHEAD = N <= 4;
    const int blocks = (rows + 15) / 16, first = c.warp * T.of_warp;
    Shared& s = c.s;
    if (blocks > 0 && first < T.units) {
        uint4 x[N][BLOCKS], w[AHEAD ? N : 1][2];
        Squares squares;
        const Stored* from;  // this lane's numbers of the units
        auto look_at = [&](const Stored* tile, int unit) { from = tile + unit % T.of_tile * OF_UNIT + 8 * c.lane; };
        auto load = [&](int j, uint4 (&to)[2]) {
            to[0] = *(const uint4*)(from + j * OF_UNIT), to[1] = *(const uint4*)(from + j * OF_UNIT + OF_UNIT / 2);
        };
        auto load_all = [&]() {
#pragma unroll
            for (int j = 0; j < (AHEAD ? N : 0); j++)
                if (T.units % N == 0 || first + j < T.units) load(j, w[j]);
                else w[j][0] = w[j][1] = uint4{0, 0, 0, 0};  // or their registers were taken everywhere
        };
        auto add_squares = [&]() {
#pragma unroll
            for (int j = 0; j < N; j++) squares.add(x[j]);
        };
        if (ALL) {
            look_at(c.wait_for(c.tile + first / T.of_tile), first);
            if (AHEAD) load_all();
            take(x, first);
            if (NORM) add_squares();
        }
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            Products products;
#pragma unroll 1
            for (int chunk = 0; chunk < T.of_warp / N; chunk++) {
                const int unit = first + chunk * N;
                if (unit >= T.units) break;
                if (!ALL || (!AHEAD && block > 0)) look_at(c.wait_for(c.tile + block * T.tiles + unit / T.of_tile), unit);
                if (!ALL) {
                    take(x, unit);
                    if (NORM && block == 0) add_squares();
                }
#pragma unroll
                for (int j = 0; j < N; j++)
                    if (T.units % N == 0 || unit + j < T.units) {
                        uint4(&own)[2] = w[AHEAD ? j : 0];
                        if (!AHEAD || !ALL) load(j, own);
                        products.add(own, x[j]);
                    }
                if (ALL) break;
            }
            if (ALL && AHEAD && block + 1 < blocks) {
                look_at(c.wait_for(c.tile + (block + 1) * T.tiles + first / T.of_tile), first);
                load_all();
            }
            float(*to)[SUMS_PITCH] = s.sums[sums_from(STAGE) + block][c.warp];
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                for (int k = 0; k < (R == 1 ? 3 : 4); k += R == 1 ? 2 : 1) {
                    const int column = 8 * i + c.lane % 4 * 2 + k % 2;
                    if (R > 1 || column == 0) to[column][c.lane / 4 + k / 2 * 8] = products.of(i, k);
                }
        }
        if (NORM) {
            const int column = c.lane / 4;
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
                if (R == 1 ? c.lane == 0 : c.lane % 4 == column / 2)
                    s.squares[STAGE / 2][c.warp][8 * i + column] = R > 1 && column % 2 ? squares.of(i, 1) : squares.of(i, 0);
        }
    } else if (blocks > 0) {  // it has no part
        for (int i = c.lane; i < blocks * R * 16; i += LANES)
            s.sums[sums_from(STAGE) + i / (R * 16)][c.warp][i / 16 % R][i % 16] = 0.0f;
        if (NORM)
            for (int i = c.lane; i < R; i += LANES) s.squares[STAGE / 2][c.warp][i] = 0.0f;
    }
    c.tile += blocks * T.tiles;
    __syncwarp();
    if (c.lane == 0) *(volatile u32*)&s.progress[c.warp] = c.tile;
    barrier();
}

// A row of sums, N of them from `row` on, each in the order of the warps.
template <int STAGE, int N>
DEVICE void sums_of(const Shared& s, int row, int sequence, float (&sums)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) sums[k] = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float* from = &s.sums[sums_from(STAGE) + row / 16][w][sequence][row % 16];
        if (N == 4) {
            const float4 part = *(const float4*)from;
            sums[0] += part.x, sums[1] += part.y, sums[N - 2] += part.z, sums[N - 1] += part.w;
        } else {
            const float2 part = *(const float2*)from;
            sums[0] += part.x, sums[1] += part.y;
        }
    }
}
template <int STAGE>
DEVICE float rstd_of(const Shared& s, int sequence) {
    float squares = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) squares += s.squares[STAGE / 2][w][sequence];
    return rstd_of_sum(squares);
}

// Words 0 to `count`, at most MOST, of each of n sequences, each by a thread, or some of its copies. `value(word,
// sequence, e)` gives it, the e-th of the thread, and `at(word, sequence)` where in `words` it lies. A thread has
// the same words each time.
template <int MOST>
struct Shares {
    static constexpr int ALL = MOST * R;
    static constexpr int SPLIT = ALL >= THREADS ? 1 : least(REPLICAS, pow2_to(THREADS / ALL));
    static constexpr int EACH = (ALL * SPLIT + THREADS - 1) / THREADS;
};
template <int MOST, class Do>
DEVICE void each_word(int count, int n, int thread, Do act) {
    using Share = Shares<MOST>;
#pragma unroll
    for (int e = 0; e < Share::EACH; e++) {
        const int i = thread + e * THREADS, at = i % Share::ALL, word = at % MOST, sequence = at / MOST;
        if (i < Share::ALL * Share::SPLIT && word < count && sequence < n) act(word, sequence, i / Share::ALL, e);
    }
}
template <int MOST, class Value, class At>
DEVICE void publish_all(u64* words, int stride, int count, int n, u32 epoch, int thread, Value value, At at) {
    each_word<MOST>(count, n, thread, [&](int word, int sequence, int copy, int e) {
        const u32 of = value(word, sequence, e);
        u64* to = words + (long long)copy * stride + at(word, sequence);
#pragma unroll
        for (int r = 0; r < REPLICAS / Shares<MOST>::SPLIT; r++)
            store_word(to + (long long)r * Shares<MOST>::SPLIT * stride, of, epoch);
    });
}

// A sequence's context is in as many chunks as there are steps, up to CHUNKS, and each has as many steps as the others
// but for the last. That depends on its position alone.
constexpr int STEP = ALONE ? CHUNK_OF_WARP : CHUNK_STEP;
DEVICE int chunk_at(int position) { return (position / STEP + CHUNKS) / CHUNKS * STEP; }
DEVICE int chunks_at(int position) { return position / chunk_at(position) + 1; }

// `attend` (parts.cu) by one warp.
template <class There>
DEVICE void attend_alone(
    const Model& model, Stored* keys, Stored* values, const u64* qkv, u64* to, int stride, int layer, int head,
    int begin, int chunk, int position, u32 here, int lane, Watchdog watchdog, u32 where, There there) {
    constexpr int AHEAD = E <= 16 ? 4 : 2;  // how many are under way: small ones take less time than they wait
    const int end = least(position, begin + chunk);
    Positions held[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) held[i].load(keys, values, begin + i * CHUNK_OF_WARP, end, lane);
    const bool has_newest = position - begin < chunk;
    Newest newest;
    newest.prepare(model, layer, position, lane);
    newest.take(qkv, head, has_newest, here, watchdog, where, lane, there);
    float score = 0.0f;
    if (has_newest) score = newest.score(), newest.store(keys, values, position, lane);
    Attended all;
#pragma unroll 1
    for (int first = begin; first < end; first += AHEAD * CHUNK_OF_WARP) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int own = first + i * CHUNK_OF_WARP;
            if (own < end) all.add(held[i], newest.query, own, end, lane);
            held[i].load(keys, values, own + AHEAD * CHUNK_OF_WARP, end, lane);
        }
    }
    if (has_newest) all.add_one(score, newest.value);
    const u32 lse = __float_as_uint(all.m + log_2(all.l));
#pragma unroll 1
    for (int r = lane / WIDE; r < REPLICAS; r += STRIPES) {
        u64* copy = to + (long long)r * stride;
#pragma unroll
        for (int j = 0; j < LANE_PAIRS; j++) {
            const int pair = pair_of(j, lane);
            if (pair < PAIRS)
                store_word(copy + head * PAIRS + pair, packed(quotient(all.sum[j][0], all.l), quotient(all.sum[j][1], all.l)), here);
        }
        if (lane % WIDE == 0) store_word(copy + Q / 2 + head, lse, here);
    }
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__((WARPS + MORE_WARPS) * LANES, 1) write_texts(
    const GRID_CONSTANT Model model, const GRID_CONSTANT Memory given, int all_n, int n_slots, int max_len, int n_tokens,
    int stride, u32 epoch, u64 timeout_ns
#if TRACE
    , u64* trace
#endif
) {
    // the sequences of a group are neighbours
    const int groups = (gridDim.x + GRID - 1) / GRID, group = blockIdx.x / GRID;
    const int first_sequence = group * all_n / groups, n = (group + 1) * all_n / groups - first_sequence;
    if (n == 0) return;

    SHARED_MEMORY(bytes);
    Shared& s = *(Shared*)bytes;
    Memory memory = given;
    memory.words += (long long)group * REPLICAS * stride;
    memory.written += (long long)first_sequence * max_len, memory.ending += 2 * first_sequence;
    memory.stop_ids += first_sequence * LANES, memory.sequences += SEQUENCE_INTS * first_sequence;
    const int cta = blockIdx.x % GRID, thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES;
    Watchdog watchdog{&s.watchdog};

    if (thread < SLOTS) make_barrier(&s.full[thread]);
    if (thread < WARPS) s.progress[thread] = 0;
    if (thread < STAGES) {
        s.first[thread] = 16 * TILES[thread].first(cta);
        s.count[thread] = most(least(16 * TILES[thread].end(cta), TILES[thread].rows) - s.first[thread], 0);
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
    if (thread == 0) s.issued = s.ended = s.watchdog.gave_up = s.watchdog.where = s.watchdog.layers = 0;
#if DRAWS
    if (thread == 0) s.drawn.logits = memory.logits + (long long)first_sequence * V + 16 * TILES[HEAD].first(cta);
#endif
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
    Consumer consumer{s, warp, lane, watchdog, 0};
    const int qkv_rows = s.count[QKV], qkv_first = s.first[QKV], x_rows = s.count[OUT], x_first = s.first[OUT];
    const int hidden_rows = s.count[GATE_UP], hidden_first = s.first[GATE_UP] / 2;
    const int head_rows = s.count[HEAD], head_first = s.first[HEAD];
    // this lane's sequences of the blocks
    u32 has = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) has |= (u32)(8 * i + lane / 4 < n) << i;
    auto take_words = [&](auto& x, int first, auto columns, int at, u32 of_epoch, u32 where) {
        constexpr int COLUMNS = decltype(columns)::of;
        int own = lane;
        const u64* from = words + at;
        launder(own), launder(from);
        from += own / 4 * (COLUMNS / 2) + own % 4 * 4;
        take_units<COLUMNS / 32>(x, first, has, of_epoch, watchdog, where,
                                 [&](int unit, int i) { return from + 8 * i * (COLUMNS / 2) + unit * 16; });
    };
    float kept[Shares<X_WORDS>::EACH][2];  // this thread's rows of x
    int stop_id[OWN], limit[OWN], count[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int own = warp + i * WARPS < n ? warp + i * WARPS : 0;
        stop_id[i] = memory.stop_ids[own * LANES + lane], limit[i] = memory.sequences[SEQUENCE_INTS * own + 3];
        count[i] = 0;
    }
    bool all_ended = false;
    const bool writes = cta == GRID - 1;  // the tokens; it is none of those that begin the next one, where there are others
#if TRACE
    int marks = 0;
#endif
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
        int most_chunks = 1, longest = 0;
        for (int r = 0; r < n; r++)
            most_chunks = most(most_chunks, chunks_at(s.position[r])), longest = most(longest, s.position[r]);
        // whether the L2 has room for a layer's keys and values
        const bool fetches = (long long)all_n * KV * E * longest * 2 * (int)sizeof(Stored) <= FETCHED_BYTES;
        const int tasks = most_chunks * n * H;
        int chunks[BLOCKS];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) chunks[i] = has >> i & 1 ? chunks_at(s.position[8 * i + lane / 4]) : 1;
        // whether another CTA or warp than now reads some keys and values for the next token
        bool moves = false;
        for (int r = 0; r < n; r++) moves |= chunk_at(s.position[r]) != chunk_at(s.position[r] + 1);
        auto take_embeddings = [&](auto& x, int first) {
#pragma unroll
            for (int j = 0; j < (int)(sizeof x / sizeof x[0]); j++)
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    x[j][i] = uint4{0, 0, 0, 0};
                    if (first + j < D / 32 && (has >> i & 1))
                        x[j][i] = *(const uint4*)(model.embedding + (long long)s.token[8 * i + lane / 4] * D + (first + j) * 32 + lane % 4 * 8);
                }
        };
        MARK(LAYERS, 0, true)

#pragma unroll 1
        for (int layer = 0; layer < LAYERS; layer++, here++) {
            const u32 where = 3u << 28 | (u32)layer << 4;
            if (thread == 0) *(volatile u32*)&s.watchdog.layers = here;
            run_stage<QKV, true>(consumer, qkv_rows, [&](auto& x, int first) {
                if (layer == 0) take_embeddings(x, first);
                else take_words(x, first, Constant<D>{}, Words::x, here - 1, where);
                MARK(layer, 1, true)
            });
            publish_all<QKV_WORDS>(
                memory.words + Words::qkv, stride, qkv_rows / 2, n, here, thread,
                [&](int word, int r, int) {
                    float sums[2];
                    sums_of<QKV>(s, 2 * word, r, sums);
                    const float rstd = rstd_of<QKV>(s, r);
                    return packed(sums[0] * rstd, sums[1] * rstd);
                },
                [&](int word, int r) { return r * (N_QKV / 2) + qkv_first / 2 + word; });
            MARK(layer, 2, qkv_rows > 0)

            // attention
            const int place = (cta - ATTENTION_OFFSET + GRID) % GRID;
            bool another = false;
#pragma unroll 1
            for (int task = ALONE ? warp * GRID + place : place; task < tasks; task += ALONE ? WARPS * GRID : GRID) {
                const int of_chunk = task / (n * H), r = task % (n * H) / H, head = task % H;
                const int position = s.position[r], chunk = chunk_at(position), begin = of_chunk * chunk;
                if (begin > position) continue;
                const long long of_cache = (((long long)layer * n_slots + s.slot[r]) * KV + head / GROUP) * max_len * E;
                const u64* qkv = words + Words::qkv + r * (N_QKV / 2);
                u64* to = memory.words + Words::attention + ((long long)of_chunk * R + r) * WORDS_OF_CHUNK;
                if constexpr (ALONE) {
                    attend_alone(model, memory.keys + of_cache, memory.values + of_cache, qkv, to, stride, layer, head,
                                 begin, chunk, position, here, lane, watchdog, where | 1, [&]() { MARK(layer, 3, true) });
                } else {
                    if (another) barrier();
                    another = true;
                    attend(s, model, memory.keys + of_cache, memory.values + of_cache, qkv, to, stride, layer, head, begin,
                           chunk, position, here, thread, watchdog, where | 1, [&]() { MARK(layer, 3, true) });
                }
                if (fetches && (ALONE ? lane : thread) < 2 && head % GROUP == 0) {  // the next layer's
                    const long long from = of_cache + (long long)begin * E
                                           + (layer + 1 < LAYERS ? 1 : 1 - LAYERS) * ((long long)n_slots * KV * max_len * E);
                    prefetch_row((lane == 0 ? memory.keys : memory.values) + from,
                                 least(position + 1 - begin, chunk) * E * (int)sizeof(Stored));
                }
                MARK(layer, 4, true)
            }

            run_stage<OUT, false>(consumer, x_rows, [&](auto& x, int first) {
                take_attention(x, first, has, chunks, here, watchdog, where | 2, words + Words::attention, lane);
                MARK(layer, 5, true)
            });
            if (layer == 0)
                each_word<X_WORDS>(x_rows / 2, n, thread, [&](int word, int r, int, int e) {
                    unpack(*(const u32*)(model.embedding + (long long)s.token[r] * D + x_first + 2 * word), kept[e]);
                });
            auto add_to_x = [&](auto stage, int words_at) {
                publish_all<X_WORDS>(
                    memory.words + words_at, stride, x_rows / 2, n, here, thread,
                    [&](int word, int r, int e) {
                        float sums[2];
                        sums_of<decltype(stage)::of>(s, 2 * word, r, sums);
                        kept[e][0] += sums[0], kept[e][1] += sums[1];
                        return packed(kept[e][0], kept[e][1]);
                    },
                    [&](int word, int r) { return r * (D / 2) + x_first / 2 + word; });
            };
            add_to_x(Constant<OUT>{}, Words::mid);
            MARK(layer, 6, x_rows > 0)

            run_stage<GATE_UP, true>(consumer, hidden_rows, [&](auto& x, int first) {
                take_words(x, first, Constant<D>{}, Words::mid, here, where | 3);
                MARK(layer, 7, true)
            });
            publish_all<HIDDEN_WORDS>(
                memory.words + Words::hidden, stride, hidden_rows / 4, n, here, thread,
                [&](int word, int r, int) {
                    float sums[4], hidden[2];
                    sums_of<GATE_UP>(s, 4 * word, r, sums);
                    const float rstd = rstd_of<GATE_UP>(s, r);
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const float gate = sums[2 * k] * rstd, up = sums[2 * k + 1] * rstd;
                        hidden[k] = quotient(gate, 1.0f + power_of_2(-LOG2E * gate)) * up;
                    }
                    return packed(hidden[0], hidden[1]);
                },
                [&](int word, int r) { return r * (F / 2) + hidden_first / 2 + word; });
            MARK(layer, 8, hidden_rows > 0)

            run_stage<DOWN, false>(consumer, x_rows, [&](auto& x, int first) {
                take_words(x, first, Constant<F>{}, Words::hidden, here, where | 4);
                MARK(layer, 9, true)
            });
            add_to_x(Constant<DOWN>{}, Words::x);
            MARK(layer, 10, x_rows > 0)
        }

        // head: of each lane the best of its rows for its columns
        Best best[2 * BLOCKS];
        {
            constexpr Tiles T = tiles_of(HEAD);
            const int blocks = (head_rows + 15) / 16, row = lane / 4;
            const u32 base = consumer.tile;
            const bool ahead = warp < blocks && warp * T.tiles < SLOTS;  // of those that may come before one is used
            const Stored* tile = ahead ? consumer.wait_for(base + warp * T.tiles) : nullptr;
            consumer.tile += blocks * T.tiles;
            gather_row<R * D / 2>(words + Words::x, n * D / 2, here - 1, thread, watchdog, 4u << 28,
                                  [&](int i, u32 value) { *(u32*)&s.narrow[i / (D / 2)][i % (D / 2) * 2] = value; });
            MARK(LAYERS, 11, true)
            barrier();
            float rstd[2 * BLOCKS];
            auto add_logit = [&](int row, int k, float logit) {
                const int r = k / 2 * 8 + lane % 4 * 2 + k % 2;
                if (row >= head_rows || r >= n) return;
                if (!(logit == logit)) logit = INFINITE;  // a NaN is the best
#if DRAWS
                best[k].add(s.drawn.keep(r, row, logit), head_first + row, logit);
#else
                best[k].add(logit, head_first + row, logit);
#endif
            };
            auto run_block = [&](int block, auto is_first) {
                constexpr Tiles T = tiles_of(HEAD);
                constexpr int TOGETHER = divisor_of(T.of_tile, T.units, most(1, 4 / BLOCKS));
                Products products;
                Squares squares;
                const Stored* x_row = &s.narrow[0][0] + row * pitch_of(D) + lane % 4 * 8;
#pragma unroll 1
                for (int j = 0; j < T.tiles; j++) {
                    if (block > warp || j > 0 || !ahead) tile = consumer.wait_for(base + block * T.tiles + j);
                    const int first = j * T.of_tile, end = least(T.of_tile, T.units - first);
#pragma unroll 1
                    for (int unit = 0; unit < end; unit += TOGETHER) {
                        uint4 w[TOGETHER][2], x[TOGETHER][BLOCKS];
#pragma unroll
                        for (int t = 0; t < TOGETHER; t++) {
                            const Stored* from = tile + (unit + t) * OF_UNIT + 8 * lane;
                            w[t][0] = *(const uint4*)from, w[t][1] = *(const uint4*)(from + OF_UNIT / 2);
#pragma unroll
                            for (int i = 0; i < BLOCKS; i++) {
                                x[t][i] = uint4{0, 0, 0, 0};
                                if (R % 8 == 0 || row < R)
                                    x[t][i] = *(const uint4*)(x_row + 8 * i * pitch_of(D) + (first + unit + t) * 32);
                            }
                        }
#pragma unroll
                        for (int t = 0; t < TOGETHER; t++) {
                            products.add(w[t], x[t]);
                            if constexpr (decltype(is_first)::of) squares.add(x[t]);
                        }
                    }
                }
                if constexpr (decltype(is_first)::of) {
#pragma unroll
                    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                        for (int k = 0; k < 2; k++)  // of column 2 (lane % 4) + k
                            rstd[2 * i + k] = rstd_of_sum(__shfl_sync(~0u, squares.of(i, k), (lane % 4 * 2 + k) * 4 + lane % 4));
                }
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const int column = 2 * i + k % 2;
                        add_logit(16 * block + row + k / 2 * 8, column, products.of(i, k) * rstd[column]);
                    }
            };
            if (warp < blocks) run_block(warp, Constant<1>{});
#pragma unroll 1
            for (int block = warp + WARPS; block < blocks; block += WARPS) run_block(block, Constant<0>{});
            __syncwarp();
            if (lane == 0) *(volatile u32*)&s.progress[warp] = consumer.tile;
        }
        MARK(LAYERS, 12, true)
#pragma unroll
        for (int k = 0; k < 2 * BLOCKS; k++) {
            const int column = k / 2 * 8 + lane % 4 * 2 + k % 2;
            if (R % 8 == 0 || column < R) best[k].store(s.best[warp * 8 + lane / 4][column]);
        }
        barrier();
        if (moves) fence();
        const u32 of_best = epoch + (u32)t;
        const int records = Words::best + (of_best & 1) * R * RECORD * GRID, others = records + R * CHOOSING * GRID;
#pragma unroll 1
        for (int r = warp; r < n; r += WARPS) {
            Best of_cta;
#pragma unroll
            for (int i = lane; i < WARPS * 8; i += LANES) {
                Best of_row;
                of_row.load(s.best[i][r]);
                of_cta.join(of_row.by, of_row.id, of_row.raw, of_row.total);
            }
            of_cta.join_warp();
            of_cta.total = sum_of_warp(of_cta.total);
            float record[RECORD];
            of_cta.store(record);
#pragma unroll
            for (int i = 0; i < RECORD; i++)
                publish(copy, i < CHOOSING ? records + r * CHOOSING * GRID + record_at(cta, i)
                                           : others + r * (RECORD - CHOOSING) * GRID + record_at(cta, i) - CHOOSING * GRID,
                        __float_as_uint(record[i]), of_best, lane);
            if (of_cta.id < V)  // whichever is the next token, its row is in the L2
#pragma unroll 1
                for (int i = lane * 64; i < D; i += LANES * 64) prefetch(model.embedding + (long long)of_cta.id * D + i);
        }
        gather_row<R * CHOOSING * GRID>(
            words + records, n * CHOOSING * GRID, of_best, thread, watchdog, 4u << 28 | 1,
            [&](int i, u32 value) { s.records[i / (CHOOSING * GRID)][i % (CHOOSING * GRID)] = __uint_as_float(value); });
        if (writes) {
            constexpr int OTHERS = (RECORD - CHOOSING) * GRID;
            gather_row<R * OTHERS>(
                words + others, n * OTHERS, of_best, thread, watchdog, 4u << 28 | 1,
                [&](int i, u32 value) { s.records[i / OTHERS][CHOOSING * GRID + i % OTHERS] = __uint_as_float(value); });
        }
        if (moves) fence();
        barrier();
        MARK(LAYERS, 13, true)
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
            if (writes) normalizer[own].find(s.records[r], lane);
#if DRAWS
            s.drawn.best[r] = logit[own], s.drawn.id[r] = finite[own] && s.ending[r] == GROWING ? token[own] : V;
#endif
        }
#if DRAWS
        barrier();
        // the records of what is best have been read: there is room for those of what is kept
        draw_all(s.drawn, (u32*)s.records[0], sums, words, copy, Words::drawn, Words::chosen, uniform, n, head_first,
                 head_rows, of_best, cta, thread, watchdog, 5u << 28);
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
                if (writes && lane == 0)
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
