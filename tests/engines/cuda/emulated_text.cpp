// text.cu, or texts.cu where SEQUENCES is defined, on a CPU, for tests: `run_text` is a launch.

#include "emulator.h"
#include "parts.cu"

#include "search.cu"
#ifdef SEQUENCES
#include "draws.cu"
#include "texts.cu"
#else
#include "draw.cu"
#include "text.cu"
#endif

static struct {
    const Model* model;
    const Memory* memory;
    int numbers[10];
    u32 epoch;
    u64 timeout_ns;
    float fractions[4];
    u64* trace;
} given;

static void kernel() {
    const int* i = given.numbers;
#ifdef SEQUENCES
    write_texts(*given.model, *given.memory, i[0], i[1], i[2], i[3], i[4], given.epoch, given.timeout_ns
#if TRACE
                , given.trace
#endif
    );
#else
    write_text(*given.model, *given.memory, i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], given.epoch, given.timeout_ns
#if DRAWS
               , i[8], i[9], given.fractions[0], given.fractions[1], given.fractions[2], given.fractions[3]
#endif
#if TRACE
               , given.trace
#endif
    );
#endif
}

// `numbers` are the kernel's own between its pointers and the epoch.
extern "C" void run_text(
    const Model* model, const Memory* memory, const int* numbers, const float* fractions, u32 epoch, u64 timeout_ns, int ctas, unsigned seed,
    u64* trace) {
    given.model = model, given.memory = memory, given.epoch = epoch, given.timeout_ns = timeout_ns, given.trace = trace;
    for (int i = 0; i < 10; i++) given.numbers[i] = numbers[i];
    for (int i = 0; i < 4; i++) given.fractions[i] = fractions[i];
    emulator::run(kernel, ctas, (WARPS + MORE_WARPS) * LANES, THREADS, SHARED_BYTES, seed);
}
