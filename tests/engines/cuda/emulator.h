// CUDA C++ on a CPU, as far as text.cu uses it: every thread of every CTA is a fiber, all in one
// thread of the process, which goes from one to the next in a random order wherever one waits.
// Copies end some time after they began. What waits for something that does not come times out.

#include <ucontext.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define DEVICE inline
#define GRID_CONSTANT
#define SHARED_MEMORY(name) unsigned char* name = emulator::current->cta->shared

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { unsigned x; };
static Index blockIdx, threadIdx, gridDim;

namespace emulator {

struct Meeting {  // of `size` fibers, again and again
    int size = 0, arrived = 0;
    unsigned generation = 0;
};
struct Warp {
    Meeting meeting;
    u64 given[32], taken[32];
    u32 fragments[32][6];
};
struct Cta {
    unsigned char* shared;
    Meeting all, named;
    std::vector<Warp> warps;
};
struct Fiber {
    ucontext_t context;
    Cta* cta;
    Warp* warp;
    unsigned block, thread;
    bool done = false;
    std::vector<char> stack;
};
struct Copy {
    void* to;
    const void* from;
    u32 bytes;
    u64* barrier;
    int steps;
};

static Fiber* current;
static ucontext_t scheduler;
static std::mt19937 random_number;
static std::vector<Copy> copies;
static std::map<u64*, u32> expected;  // bytes that have not come, by barrier

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void meet(Meeting& m) {
    const unsigned generation = m.generation;
    if (++m.arrived == m.size) {
        m.arrived = 0;
        m.generation++;
    } else {
        while (m.generation == generation) yield();
    }
}

// Every lane's value, for every lane.
inline const u64* exchange(u64 value) {
    Warp& w = *current->warp;
    w.given[current->thread % 32] = value;
    const unsigned generation = w.meeting.generation;
    if (++w.meeting.arrived == w.meeting.size) {
        memcpy(w.taken, w.given, sizeof w.given);
        w.meeting.arrived = 0;
        w.meeting.generation++;
    } else {
        while (w.meeting.generation == generation) yield();
    }
    return w.taken;
}

template <class T>
inline u64 bits(T x) { u64 y = 0; memcpy(&y, &x, sizeof x); return y; }
template <class T>
inline T from_bits(u64 y) { T x; memcpy(&x, &y, sizeof x); return x; }

inline void (*entry)();
inline void start() {
    entry();
    current->done = true;
    yield();
}

inline void end_copies() {
    for (size_t i = 0; i < copies.size();) {
        if (--copies[i].steps > 0) { i++; continue; }
        memcpy(copies[i].to, copies[i].from, copies[i].bytes);
        if ((expected[copies[i].barrier] -= copies[i].bytes) == 0) (*copies[i].barrier)++;  // its phase ends
        copies.erase(copies.begin() + i);
    }
}

inline void run(void (*kernel)(), int ctas, int threads, int named, size_t shared_bytes, unsigned seed) {
    entry = kernel;
    gridDim.x = ctas;
    random_number.seed(seed);
    copies.clear();
    expected.clear();
    std::vector<Cta> all(ctas);
    std::vector<Fiber> fibers(ctas * threads);
    for (int c = 0; c < ctas; c++) {
        all[c].shared = (unsigned char*)aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024);
        memset(all[c].shared, 0xff, shared_bytes);  // NaN
        all[c].all.size = threads;
        all[c].named.size = named;
        all[c].warps.resize(threads / 32);
        for (auto& warp : all[c].warps) warp.meeting.size = 32;
        for (int t = 0; t < threads; t++) {
            Fiber& f = fibers[c * threads + t];
            f.cta = &all[c], f.warp = &all[c].warps[t / 32], f.block = c, f.thread = t;
            f.stack.resize(256 << 10);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data();
            f.context.uc_stack.ss_size = f.stack.size();
            f.context.uc_link = &scheduler;
            makecontext(&f.context, start, 0);
        }
    }
    // a warp's lanes follow one another, and warps follow in a random order
    const int warps = ctas * threads / 32;
    std::vector<int> order(warps);
    for (int i = 0; i < warps; i++) order[i] = i;
    for (size_t left = fibers.size(); left > 0;) {
        for (int i = warps - 1; i > 0; i--) std::swap(order[i], order[random_number() % (i + 1)]);
        for (int warp : order)
            for (int lane = 0; lane < 32; lane++) {
                Fiber& f = fibers[warp * 32 + lane];
                if (f.done) continue;
                current = &f;
                blockIdx.x = f.block, threadIdx.x = f.thread;
                swapcontext(&scheduler, &f.context);
                left -= f.done;
            }
        end_copies();
    }
    for (auto& cta : all) free(cta.shared);
}

}  // namespace emulator

// ---- CUDA's own

inline void __syncthreads() { emulator::meet(emulator::current->cta->all); }
inline void __syncwarp() { emulator::exchange(0); }
template <class T>
inline T __shfl_xor_sync(unsigned, T x, int with) {
    const int lane = emulator::current->thread % 32;
    return emulator::from_bits<T>(emulator::exchange(emulator::bits(x))[lane ^ with]);
}
template <class T>
inline T __shfl_sync(unsigned, T x, int from) {
    return emulator::from_bits<T>(emulator::exchange(emulator::bits(x))[from & 31]);
}
inline bool __any_sync(unsigned, bool x) {
    const u64* all = emulator::exchange(x);
    for (int i = 0; i < 32; i++) if (all[i]) return true;
    return false;
}
inline bool __all_sync(unsigned, bool x) { return !__any_sync(~0u, !x); }
inline u32 __reduce_max_sync(unsigned, u32 x) {
    const u64* all = emulator::exchange(x);
    u32 most = 0;
    for (int i = 0; i < 32; i++) most = (u32)all[i] > most ? (u32)all[i] : most;
    return most;
}
inline int __reduce_min_sync(unsigned, int x) {
    const u64* all = emulator::exchange((u64)(u32)x);
    int least = (int)(u32)all[0];
    for (int i = 1; i < 32; i++) least = (int)(u32)all[i] < least ? (int)(u32)all[i] : least;
    return least;
}
template <class T>
inline T __shfl_up_sync(unsigned, T x, int by) {
    const int lane = emulator::current->thread % 32;
    return emulator::from_bits<T>(emulator::exchange(emulator::bits(x))[lane >= by ? lane - by : lane]);
}
inline u32 __ballot_sync(unsigned, bool x) {
    const u64* all = emulator::exchange(x);
    u32 votes = 0;
    for (int i = 0; i < 32; i++) votes |= (u32)all[i] << i;
    return votes;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
inline void delay() {}
inline u32 atomicOr(u32* at, u32 x) {
    const u32 old = *at;
    *at |= x;
    return old;
}
inline u32 atomicAdd(u32* at, u32 x) {
    const u32 was = *at;
    *at += x;
    return was;
}
inline float __uint_as_float(u32 x) { return emulator::from_bits<float>(x); }
inline float __int_as_float(int x) { return emulator::from_bits<float>((u32)x); }
inline u32 __float_as_uint(float x) { return (u32)emulator::bits(x); }
inline int __float_as_int(float x) { return (int)(u32)emulator::bits(x); }
inline u32 atomicCAS(u32* at, u32 old, u32 fresh) {
    const u32 was = *at;
    if (was == old) *at = fresh;
    return was;
}

// ---- device.cu

inline u64 load_word(const u64* at) { return *(const volatile u64*)at; }
inline void load_word_if(bool wanted, const u64* at, u64& word) { if (wanted) word = load_word(at); }
inline void load_words_if(bool wanted, const u64* at, u64& word, u64& next) {
    load_word_if(wanted, at, word), load_word_if(wanted, at + 1, next);
}
inline void store_word(u64* at, u64 word) { *(volatile u64*)at = word; }
inline void store_to_host(u64* at, u64 word) { *(volatile u64*)at = word; }
inline void add_to(u64* sum, u64 x) { *sum += x; }
inline void add_one(u64* count) { ++*count; }
inline u64 count_so_far(const u64* count) { return *(const volatile u64*)count; }
inline u64 now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
}
inline void look_again() { emulator::yield(); }
template <class T>
inline void launder(T&) {}
inline void rest() { emulator::yield(); }
template <int N>
inline void give_registers() {}
template <int N>
inline void take_registers() {}

inline void make_barrier(u64* barrier) { *barrier = 0; }
inline void show_to_copies() {}
inline void expect(u64* barrier, u32 bytes) {
    if (emulator::expected[barrier] != 0) {
        fprintf(stderr, "a barrier expects bytes before the last ones have come\n");
        abort();
    }
    emulator::expected[barrier] = bytes;
}
inline void copy(void* to, const void* from, u32 bytes, u64* barrier) {
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16 != 0) {
        fprintf(stderr, "a copy of %u bytes is not aligned\n", bytes);
        abort();
    }
    memset(to, 0xff, bytes);
    emulator::copies.push_back({to, from, bytes, barrier, 1 + (int)(emulator::random_number() % 20)});
}
inline bool has_come(u64* barrier, u32 parity) {
    if ((*(volatile u64*)barrier & 1) != parity) return true;
    emulator::yield();
    return false;
}
template <int N>
inline void wait_for_threads() { emulator::meet(emulator::current->cta->named); }

template <class T>
inline T load_past_l1(const T* at) { return *at; }
template <int N>
inline void load_floats(float* to, const float* from) { memcpy(to, from, N * sizeof(float)); }
inline void fence() {}
inline void prefetch(const void*) {}
inline void prefetch_row(const void* at, u32 bytes) {
    if (((uintptr_t)at | bytes) % 16 != 0) {
        fprintf(stderr, "a prefetch of %u bytes is not aligned\n", bytes);
        abort();
    }
}

inline float power_of_2(float x) { return exp2f(x); }
inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
inline float quotient(float x, float y) { return x / y; }
inline float log_2(float x) { return log2f(x); }

inline u16 to_bf16(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 to_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline u16 to_f16(float x) { _Float16 y = (_Float16)x; u16 z; memcpy(&z, &y, 2); return z; }
inline u32 to_f16(float low, float high) { return to_f16(low) | (u32)to_f16(high) << 16; }
inline float from_f16(u16 x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }

inline void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::Warp& w = *emulator::current->warp;
    const int lane = emulator::current->thread % 32;
    const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(w.fragments[lane], mine, sizeof mine);
    emulator::exchange(0);
#if DTYPE == 1
    auto half = [](u32 word, int k) { return from_f16((u16)(k % 2 ? word >> 16 : word)); };
#else
    auto half = [](u32 word, int k) { return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16); };
#endif
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const u32* a = w.fragments[row % 8 * 4 + k % 8 / 2];
            const u32* b = w.fragments[column * 4 + k % 8 / 2];
            c[i] += half(a[k / 8 * 2 + row / 8], k) * half(b[4 + k / 8], k);
        }
    }
    emulator::exchange(0);
}
