// AdamW, one pass over parameter, gradient and both moments; and Σ g² for clipping.
//
// Source: Loshchilov and Hutter 2019, in PyTorch's order of operations: the weight decays by lr·λ first, then
//   m = β1·m + (1−β1)·g,  v = β2·v + (1−β2)·g²,  p −= lr·(m/(1−β1ᵗ)) / (√(v/(1−β2ᵗ)) + eps).
// All in f32. The constants are made on the host in f64, as the CPU op makes them.
#include "device.cuh"

struct AdamWArgs {
    float* p;
    const float* g;
    float* m;
    float* v;
    long long count;
    // 1 − lr·λ, lr/(1 − β1ᵗ), 1/√(1 − β2ᵗ).
    float decay, beta1, beta2, step_size, root_scale, eps, gradient_scale;
    // A table [V, E] whose gradient is rows `ids` (ascending, `touched` of them) with values g [touched, E].
    const unsigned* ids;
    int touched, width;
    // Whether rows without a gradient take a step with gradient 0 or stay.
    int step_untouched;
};

__device__ __forceinline__ void update(const AdamWArgs& a, float& p, float g, float& m, float& v) {
    g *= a.gradient_scale;
    m = a.beta1 * m + (1.0f - a.beta1) * g;
    v = a.beta2 * v + (1.0f - a.beta2) * g * g;
    p = p * a.decay - a.step_size * m / (sqrtf(v) * a.root_scale + a.eps);
}

// Grid: enough threads for count / 4.
extern "C" __global__ void __launch_bounds__(256) adamw(const AdamWArgs a) {
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at + 4 <= a.count) {
        Vector<float, 4> p = load<4>(a.p + at), m = load<4>(a.m + at), v = load<4>(a.v + at);
        const Vector<float, 4> g = load<4>(a.g + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) update(a, p.values[i], g.values[i], m.values[i], v.values[i]);
        store(a.p + at, p);
        store(a.m + at, m);
        store(a.v + at, v);
    } else {
        for (long long i = at; i < a.count; ++i) update(a, a.p[i], a.g[i], a.m[i], a.v[i]);
    }
}

// Grid: rows of the table.
extern "C" __global__ void __launch_bounds__(256) adamw_rows(const AdamWArgs a) {
    int low = 0, high = a.touched;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (a.ids[middle] < blockIdx.x)
            low = middle + 1;
        else
            high = middle;
    }
    const bool touched = low < a.touched && a.ids[low] == blockIdx.x;
    if (!touched && !a.step_untouched) return;
    const long long row = blockIdx.x * (long long)a.width;
    for (int i = int(threadIdx.x); i < a.width; i += int(blockDim.x)) {
        const float g = touched ? a.g[(long long)low * a.width + i] : 0.0f;
        update(a, a.p[row + i], g, a.m[row + i], a.v[row + i]);
    }
}

// partials[block] = Σ g² over the block's `per_block` values, in f64 and in a fixed order; the caller adds up the blocks.
// Threads: a power of two; shared memory: one double each.
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(const float* g, long long count, int per_block,
                                                                  double* partials) {
    SHARED(memory);
    double* const sums = reinterpret_cast<double*>(memory);
    const long long first = blockIdx.x * (long long)per_block, end = min(first + per_block, count);
    double sum = 0;
    for (long long i = first + threadIdx.x; i < end; i += blockDim.x) sum += double(g[i]) * double(g[i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned by = blockDim.x / 2; by > 0; by /= 2) {
        if (threadIdx.x < by) sums[threadIdx.x] += sums[threadIdx.x + by];
        __syncthreads();
    }
    if (threadIdx.x == 0) partials[blockIdx.x] = sums[0];
}
