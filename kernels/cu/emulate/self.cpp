// That the emulated device sees what it is there to see: each fault below, in a kernel of its own, must show. A fault that
// would show only on a GPU makes the other tests worth nothing.
#include "check.h"

#include <sys/wait.h>

using namespace check;

// Runs `body` in a process of its own and says whether it ended by a signal.
static bool dies(const std::function<void()>& body) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        std::freopen("/dev/null", "w", stderr);
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status);
}

static void expect(bool holds, const char* what) {
    if (holds) return;
    ++failures();
    std::printf("FAILED %s\n", what);
}

// Every thread hands its number to the next one through shared memory, with a barrier between or without.
static bool passes_on(bool barrier, Order order) {
    Guarded<int> out(64);
    emulated::launch(dim3(1), dim3(64), 64 * sizeof(int), [&] {
        SHARED(memory);
        int* const numbers = reinterpret_cast<int*>(memory);
        numbers[threadIdx.x] = int(threadIdx.x);
        if (barrier) __syncthreads();
        out[threadIdx.x] = numbers[(threadIdx.x + 1) % 64];
    }, order);
    for (int i = 0; i < 64; ++i)
        if (out[i] != (i + 1) % 64) return false;
    return true;
}

// Reads a copy after its wait or without one.
static bool copies(bool wait, Order order) {
    Guarded<float> from(std::vector<float>(32 * 4, 2.0f)), out(32);
    emulated::launch(dim3(1), dim3(32), 32 * 16, [&] {
        SHARED(memory);
        float* const mine = reinterpret_cast<float*>(memory) + 4 * threadIdx.x;
        copy_async(mine, from.data() + 4 * threadIdx.x, 16);
        commit_copies();
        if (wait) wait_for_copies<0>();
        out[threadIdx.x] = mine[3];
        wait_for_copies<0>();
    }, order);
    for (int i = 0; i < 32; ++i)
        if (out[i] != 2.0f) return false;
    return true;
}

// A [16, 16] · B [16, 8] by ldmatrix and mma against loops: values that are all different show a wrong place.
template <class T>
static void products() {
    Guarded<T> a(16 * 16), b(16 * 8 * 2);
    Guarded<float> c(16 * 8);
    for (int i = 0; i < 256; ++i) a[i] = put<T>(float(i % 61) - 30.0f), b[i] = put<T>(float(i * 7 % 53) - 26.0f);
    emulated::launch(dim3(1), dim3(32), (256 + 256) * 2, [&] {
        SHARED(memory);
        T* const left = reinterpret_cast<T*>(memory);
        T* const right = left + 256;
        for (int i = int(threadIdx.x); i < 256; i += 32) left[i] = a[i], right[i] = b[i];
        __syncthreads();
        const int lane = int(threadIdx.x);
        unsigned x[4], y[4];
        load_matrices<false>(x, left + lane % 16 * 16 + lane / 16 * 8);
        load_matrices<true>(y, right + lane % 16 * 16 + lane / 16 * 8);
        const unsigned first[2] = {y[0], y[1]};
        float sum[4] = {};
        multiply<T>(sum, x, first);
        for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
    });
    std::vector<double> expected(16 * 8);
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 16; ++k) expected[i * 8 + j] += double(get(a[i * 16 + k])) * double(get(b[k * 16 + j]));
    close<T>("product of one warp", "all different", c, expected, 1e-6);
}

// Every 16-bit value must come back from f32 as it was, and what lies between two must go to the nearer, ties to even.
template <class T>
static bool rounds() {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const float value = get(T{static_cast<unsigned short>(bits)});
        if (value != value) continue;
        if (put<T>(value).bits != bits) return false;
        const float next = get(T{static_cast<unsigned short>(bits + 1)});
        if (bits % 0x8000 == 0x7fff || !std::isfinite(next)) continue;
        const float middle = value + (next - value) / 2;
        const unsigned even = bits % 2 ? bits + 1 : bits;
        if (put<T>(middle).bits != even) return false;
        if (put<T>(std::nextafter(middle, value)).bits != bits) return false;
        if (put<T>(std::nextafter(middle, next)).bits != bits + 1) return false;
    }
    return true;
}

int main() {
    for (Order order : {Order::Ascending, Order::Descending, Order::Skewed}) {
        expect(passes_on(true, order), "a barrier passes values on");
        expect(!passes_on(false, order), "a missing barrier shows");
        expect(copies(true, order), "a copy arrives");
    }
    expect(!copies(false, Order::Ascending), "a missing wait shows");
    products<Bf16>();
    products<F16>();
    expect(rounds<Bf16>(), "bf16 rounds to nearest even");
    expect(rounds<F16>(), "f16 rounds to nearest even");
    for (bool at_end : {false, true}) {
        Guarded<float> array(5, at_end);
        expect(dies([&] { array.data()[at_end ? 5 : -1] = 1.0f; }), "a write beside an array shows");
        expect(!dies([&] { array.data()[at_end ? 4 : 0] = 1.0f; }), "a write inside an array is none");
    }
    expect(dies([] { emulated::launch(dim3(1), dim3(32), 64, [] {
                         SHARED(memory);
                         memory[64] = 0;
                     }); }),
           "a write past shared memory shows");
    expect(dies([] { emulated::launch(dim3(1), dim3(64), 0, [] {
                         if (threadIdx.x >= 32) __shfl_xor_sync(~0u, 1.0f, threadIdx.x == 40 ? 2 : 1);
                         if (threadIdx.x % 32 != 3) warp_sum(1.0f);
                     }); }),
           "a collective without one of its lanes shows");
    expect(dies([] { emulated::launch(dim3(1), dim3(32), 64, [] {
                         SHARED(memory);
                         copy_async(memory + 4, memory + 32, 16);
                     }); }),
           "a copy to where it may not go shows");
    return finish();
}
