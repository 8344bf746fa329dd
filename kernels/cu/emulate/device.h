// CUDA's execution model on a CPU, as far as the kernels of this folder use it: for tests alone.
//
// The .cu files compile as plain C++17 with this header in front of them, and run unchanged. What is modelled:
// - A thread is a fiber. It runs until a barrier or a collective of its warp, then the next one runs; so data
//   that passes between threads without a barrier arrives late, or is overwritten early, and a test sees it. Turns are
//   chosen per launch (Order), because a race may show in one order only.
// - Warp collectives (shuffles, ldmatrix, mma.sync) wait for all 32 lanes. The fragment layouts are those that the PTX ISA
//   documents for m16n8k16 and ldmatrix. An mma adds its products in f32, in ascending depth.
// - cp.async copies when it is issued or not before the wait for its group: a missing wait reads stale data, a missing
//   barrier overwrites what another thread still reads.
// - Shared memory is filled with NaN and ends where a page without access begins. Guarded arrays end so, or begin so.
// - A barrier that some threads of the block never reach, though they live, is an error and names the block.
// Not modelled: time, the memory model below barriers, and everything the kernels do not use.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline float __fmul_rn(float a, float b) { return a * b; }

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated device: %s\n", what);
    std::abort();
}

// How the threads of a block take turns, and when asynchronous copies land. Ascending and descending: all go on from one
// barrier or collective to the next together; copies land as late as they may, or at once. Skewed: a warp runs until a
// barrier of the block stops it, and each copy lands early or late at random.
enum class Order { Ascending, Descending, Skewed };

// Values that may be touched, between pages that may not. The last value ends at a page's end, or the first one begins at
// a page's beginning.
template <class T>
class Guarded {
  public:
    explicit Guarded(size_t count, bool at_end = true) : count_(count) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
        size_ = bytes + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED) fail("no memory for a guarded array");
        if (bytes && mprotect(base_ + page, bytes, PROT_READ | PROT_WRITE)) fail("mprotect of a guarded array");
        const size_t from = at_end ? bytes - count * sizeof(T) : 0;
        data_ = reinterpret_cast<T*>(base_ + page + from);
        // All bits set is NaN in every floating type here and −1 in integers: nothing that a kernel should work with.
        if (bytes) std::memset(base_ + page, 0xff, bytes);
    }
    explicit Guarded(const std::vector<T>& values, bool at_end = true) : Guarded(values.size(), at_end) {
        if (count_) std::memcpy(data_, values.data(), count_ * sizeof(T));
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept
        : base_(other.base_), size_(other.size_), data_(other.data_), count_(other.count_) {
        other.base_ = nullptr;
    }
    ~Guarded() {
        if (base_) munmap(base_, size_);
    }
    T* data() const { return data_; }
    size_t size() const { return count_; }
    T& operator[](size_t i) const { return data_[i]; }

  private:
    char* base_;
    size_t size_;
    T* data_;
    size_t count_;
};

struct Copy {
    void* to = nullptr;
    const void* from = nullptr;
    unsigned bytes = 0, size = 16;
    void land() const {
        std::memcpy(to, from, bytes);
        std::memset(static_cast<char*>(to) + bytes, 0, size - bytes);
    }
};

#ifdef __x86_64__
// swapcontext asks the kernel for the signal mask each time, which is most of what an emulated product would cost. Here
// the registers that a call has to keep go onto the stack that is left.
extern "C" void emulated_switch(void** left, void* entered);
asm(R"(
    .text
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulated_switch, .-emulated_switch
)");

struct Fiber {
    void* stack = nullptr;
    void prepare(char* memory, size_t bytes, void (*start)()) {
        // As if `start` had been called: six registers to pop, its address, a return address that is never used.
        void** top = reinterpret_cast<void**>((uintptr_t(memory) + bytes) & ~uintptr_t(15));
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(start);
        for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
        stack = top - 8;
    }
    void enter(Fiber& from) { emulated_switch(&from.stack, stack); }
};
#else
struct Fiber {
    ucontext_t context;
    void prepare(char* memory, size_t bytes, void (*start)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = memory;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, start, 0);
    }
    void enter(Fiber& from) {
        if (swapcontext(&from.context, &context)) fail("swapcontext");
    }
};
#endif

struct Thread {
    Fiber fiber;
    dim3 index;
    unsigned number = 0;
    bool done = false;
    // Set while the thread waits; cleared by whoever completes what it waits for.
    bool waits_for_block = false, waits_for_warp = false;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

struct Warp {
    unsigned arrived = 0;
    const char* kind = nullptr;
    const void* in[32];
    void* out[32];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    dim3 size, grid, number;
    unsigned char* shared = nullptr;
    Thread* current = nullptr;
    Fiber scheduler;
    std::function<void()> body;
    unsigned waiting = 0, alive = 0;
    Order order = Order::Ascending;
    uint64_t state = 0x9e3779b97f4a7c15u;
    uint64_t random() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return state >> 33;
    }
};

inline Block*& block() {
    static Block* current = nullptr;
    return current;
}

inline void yield() {
    Block* b = block();
    b->scheduler.enter(b->current->fiber);
}

inline void release_block(Block* b) {
    if (b->alive && b->waiting == b->alive) {
        for (auto& t : b->threads) t.waits_for_block = false;
        b->waiting = 0;
    }
}

inline void sync_block() {
    Block* b = block();
    b->current->waits_for_block = true;
    ++b->waiting;
    release_block(b);
    yield();
}

// All lanes hand in `in` and wait; the last one to come calls `work` for all of them.
template <class Work>
void collective(const char* kind, const void* in, void* out, Work work) {
    Block* b = block();
    Thread* t = b->current;
    Warp& w = b->warps[t->number / 32];
    if (w.arrived && std::strcmp(w.kind, kind)) fail("lanes of one warp in different collectives");
    w.kind = kind;
    const unsigned lane = t->number % 32;
    w.in[lane] = in;
    w.out[lane] = out;
    t->waits_for_warp = true;
    if (++w.arrived == 32) {
        work(w);
        w.arrived = 0;
        const unsigned first = t->number / 32 * 32;
        for (unsigned i = first; i < first + 32; ++i) b->threads[i].waits_for_warp = false;
    }
    // Even the last one goes back to the scheduler, so that lanes keep their order.
    yield();
}

inline void entry() {
    Block* b = block();
    b->body();
    if (!b->current->open.empty()) fail("a thread ended with copies that it never committed");
    b->current->done = true;
    --b->alive;
    release_block(b);
    yield();
    fail("a thread ran on after its end");
}

// Runs `body` once per thread of every block of the grid.
inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body,
                   Order order = Order::Ascending) {
    constexpr size_t STACK = 64 << 10;
    const unsigned count = size.x * size.y * size.z;
    if (count % 32) fail("expected blocks of whole warps");
    static std::vector<char> stacks;
    if (stacks.size() < count * STACK) stacks.resize(count * STACK);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                // Rounded to what the hardware aligns vector accesses to.
                Guarded<unsigned char> shared((shared_bytes + 15) / 16 * 16);
                Block b;
                b.threads.resize(count);
                b.warps.resize(count / 32);
                b.size = size;
                b.grid = grid;
                b.number = dim3(x, y, z);
                b.shared = shared.data();
                b.body = body;
                b.alive = count;
                block() = &b;
                for (unsigned i = 0; i < count; ++i) {
                    Thread& t = b.threads[i];
                    t.number = i;
                    t.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
                    t.fiber.prepare(stacks.data() + i * STACK, STACK, entry);
                }
                b.order = order;
                // Lets every thread of these that can run do so once.
                auto pass = [&](unsigned first, unsigned end) {
                    bool moved = false;
                    for (unsigned n = first; n < end; ++n) {
                        Thread& t = b.threads[order == Order::Descending ? first + (end - 1 - n) : n];
                        if (t.done || t.waits_for_block || t.waits_for_warp) continue;
                        moved = true;
                        b.current = &t;
                        t.fiber.enter(b.scheduler);
                    }
                    return moved;
                };
                while (b.alive) {
                    bool moved = false;
                    if (order == Order::Skewed) {
                        const unsigned start = unsigned(b.random() % b.warps.size());
                        for (unsigned n = 0; n < b.warps.size(); ++n) {
                            const unsigned first = (start + n) % unsigned(b.warps.size()) * 32;
                            while (pass(first, first + 32)) moved = true;
                        }
                    } else {
                        moved = pass(0, count);
                    }
                    if (!moved) {
                        std::fprintf(stderr, "emulated device: block (%u, %u, %u): %u threads live, %u at a barrier\n",
                                     x, y, z, b.alive, b.waiting);
                        fail("threads wait for each other for ever");
                    }
                }
                block() = nullptr;
            }
}

inline void copy_later(void* to, const void* from, unsigned bytes, unsigned size = 16) {
    if (uintptr_t(to) % size || uintptr_t(from) % size) fail("cp.async of an address that is not a multiple of its size");
    Block* b = block();
    const Copy copy{to, from, bytes, size};
    const bool early = b->order == Order::Descending || (b->order == Order::Skewed && b->random() % 2);
    if (early) copy.land();
    b->current->open.push_back(early ? Copy{} : copy);
}

inline void commit_copies() {
    Thread* t = block()->current;
    t->groups.push_back(std::move(t->open));
    t->open.clear();
}

inline void wait_for_copies(unsigned pending) {
    auto& groups = block()->current->groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front())
            if (copy.to) copy.land();
        groups.erase(groups.begin());
    }
}

inline float shuffle(float value, unsigned (*source)(unsigned lane, unsigned by), unsigned by) {
    struct In {
        float value;
        unsigned by;
    } in{value, by};
    float out = 0;
    collective("shfl", &in, &out, [&](Warp& w) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            const unsigned from = source(lane, static_cast<const In*>(w.in[lane])->by) % 32;
            *static_cast<float*>(w.out[lane]) = static_cast<const In*>(w.in[from])->value;
        }
    });
    return out;
}

// ldmatrix.x4 of 8×8 matrices of 16-bit values. Lane l gives the address of row l mod 8 of matrix l/8; of matrix i it gets
// the values at (l/4, 2·(l mod 4)) and the next one, or with .trans those at (2·(l mod 4), l/4) and below it.
inline void load_matrices(unsigned (&out)[4], const void* row, bool transposed) {
    if (uintptr_t(row) % 16) fail("ldmatrix of an address that is not a multiple of 16");
    collective(transposed ? "ldmatrix.trans" : "ldmatrix", row, out, [&](Warp& w) {
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned m = 0; m < 4; ++m) {
                const unsigned a = lane / 4, b = 2 * (lane % 4);
                auto at = [&](unsigned r, unsigned c) -> unsigned {
                    return static_cast<const uint16_t*>(w.in[8 * m + r])[c];
                };
                const unsigned low = transposed ? at(b, a) : at(a, b);
                const unsigned high = transposed ? at(b + 1, a) : at(a, b + 1);
                static_cast<unsigned*>(w.out[lane])[m] = low | high << 16;
            }
    });
}

// mma.sync.aligned.m16n8k16.row.col with f32 accumulators. `read` turns 16 bits into a float.
template <float (*read)(uint16_t)>
void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    struct In {
        const unsigned* a;
        const unsigned* b;
    } in{a, b};
    collective("mma", &in, c, [&](Warp& w) {
        float left[16][16], right[16][8];
        auto half = [](unsigned word, unsigned which) { return read(uint16_t(word >> (16 * which))); };
        for (unsigned lane = 0; lane < 32; ++lane) {
            const In* of = static_cast<const In*>(w.in[lane]);
            const unsigned g = lane / 4, t = lane % 4;
            for (unsigned e = 0; e < 2; ++e) {
                for (unsigned i = 0; i < 4; ++i)
                    left[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = half(of->a[i], e);
                for (unsigned i = 0; i < 2; ++i) right[2 * t + e + 8 * i][g] = half(of->b[i], e);
            }
        }
        for (unsigned lane = 0; lane < 32; ++lane) {
            float* out = static_cast<float*>(w.out[lane]);
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                for (unsigned k = 0; k < 16; ++k) out[i] += left[row][k] * right[k][column];
            }
        }
    });
}

}  // namespace emulated

#define threadIdx (emulated::block()->current->index)
#define blockIdx (emulated::block()->number)
#define blockDim (emulated::block()->size)
#define gridDim (emulated::block()->grid)

inline void __syncthreads() { emulated::sync_block(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return emulated::shuffle(value, [](unsigned lane, unsigned by) { return lane ^ by; }, unsigned(mask));
}
inline float __shfl_sync(unsigned, float value, int source) {
    return emulated::shuffle(value, [](unsigned, unsigned by) { return by; }, unsigned(source));
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
