// What text.cu needs of NVIDIA's GPUs from compute capability 9.0 on and CUDA C++ has no words for:
// PTX. tests/engines/cuda/emulator.h has the same for a CPU.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define DEVICE __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define SHARED_MEMORY(name) extern __shared__ unsigned char name[]

// ---- words between CTAs: 64 bits, whole or not at all

DEVICE u64 load_word(const u64* at) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
    return word;
}
// Two that stand side by side, each whole; where they are not wanted, they stay what they are.
DEVICE void load_words_if(bool wanted, const u64* at, u64& word, u64& next) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%3]; }"
        : "+l"(word), "+l"(next) : "r"((u32)wanted), "l"(at) : "memory");
}
DEVICE void load_word_if(bool wanted, const u64* at, u64& word) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.relaxed.gpu.global.b64 %0, [%2]; }"
                 : "+l"(word) : "r"((u32)wanted), "l"(at) : "memory");
}
DEVICE void store_word(u64* at, u64 word) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}
// What a thread has stored, or has seen through words and barriers, is seen by whoever sees a word that it stores next, and
// has such a fence behind it.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE void store_to_host(u64* at, u64 word) {
    asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}

// ---- sums that all CTAs add to, and counts of those that have

DEVICE void add_to(u64* sum, u64 x) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(sum), "l"(x) : "memory");
}
DEVICE void add_one(u64* count) {  // what the CTA has added is seen before, after a barrier of its threads
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(count) : "memory");
}
DEVICE u64 count_so_far(const u64* count) {
    u64 x;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(count) : "memory");
    return x;
}

// ---- time

DEVICE u64 now() {  // in nanoseconds
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}
DEVICE void look_again() {}  // in a loop that waits
// What is computed from x is computed where it is used: compilers keep what does not change throughout a loop in
// registers, and there may be more of it than registers.
template <class T>
DEVICE void launder(T& x) {
    if constexpr (sizeof x == 4) asm volatile("" : "+r"(x));
    else asm volatile("" : "+l"(x));
}
DEVICE void rest() { __nanosleep(500); }
// A warp sleeps now and then, for up to DELAYS nanoseconds: what waits for too little shows.
DEVICE void delay() {
#if DELAYS
    u32 x;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(x));
    x = (__shfl_sync(~0u, x, 0) ^ blockIdx.x * 0x9e3779b9u ^ threadIdx.x / 32 * 0x85ebca6bu) * 0x2c1b3c6du;
    x ^= x >> 15;
    if (x % 8 == 0) __nanosleep((x >> 3) % DELAYS);
#endif
}

// ---- copies into shared memory, and barriers that wait for their bytes

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void make_barrier(u64* barrier) {  // one thread arrives
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void copy(void* to, const void* from, u32 bytes, u64* barrier) {  // of those it expects
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
DEVICE bool has_come(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return done != 0;
}

// Registers of a thread of this group of four warps: fewer, for another group to have more.
template <int N>
DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

template <int N>
DEVICE void wait_for_threads() {  // the first N of a CTA
    asm volatile("bar.sync 1, %0;" ::"n"(N) : "memory");
}

// ---- loads and prefetches

template <class T>
DEVICE T load_past_l1(const T* at) { return __ldcg(at); }
template <int N>
DEVICE void load_floats(float* to, const float* from) {
    if constexpr (N == 4) *(float4*)to = *(const float4*)from;
    else if constexpr (N == 2) *(float2*)to = *(const float2*)from;
    else *to = *from;
}
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
DEVICE void prefetch_row(const void* at, u32 bytes) {  // both in multiples of 16
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
}

// ---- arithmetic

DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float quotient(float x, float y) { return __fdividef(x, y); }
DEVICE float log_2(float x) { return __log2f(x); }

DEVICE u16 to_bf16(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE u32 to_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE u16 to_f16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
DEVICE u32 to_f16(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE float from_f16(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// c += a b of bfloat16, or float16: 16 x 16 times 16 x 8.
#if DTYPE == 1
#define NUMBERS "f16.f16"
#else
#define NUMBERS "bf16.bf16"
#endif
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

