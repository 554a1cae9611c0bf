// text.cu on a CPU, for tests: `run_text` is a launch.

#include "emulator.h"
#include "parts.cu"
#include "text.cu"

static struct {
    const Model* model;
    const Memory* memory;
    int slot, n_slots, max_len, token, position, n_tokens, passes, stride;
    u32 epoch;
    u64 timeout_ns;
} given;

static void kernel() {
    write_text(given.model, given.memory, given.slot, given.n_slots, given.max_len, given.token,
               given.position, given.n_tokens, given.passes, given.stride, given.epoch, given.timeout_ns);
}

extern "C" void run_text(
    const Model* model, const Memory* memory, int slot, int n_slots, int max_len, int token,
    int position, int n_tokens, int passes, int stride, u32 epoch, u64 timeout_ns, int ctas,
    unsigned seed) {
    given = {model, memory, slot, n_slots, max_len, token, position, n_tokens, passes, stride, epoch, timeout_ns};
    emulator::run(kernel, ctas, (WARPS + 1) * LANES, THREADS, SHARED_BYTES, seed);
}
