// DoRA: results scaled by columns, lengths of rows. The gradient of the magnitudes is a sum of rows.cu.
//
// Source: Liu et al. 2024, W' = diag(m/n)·(W + s·B·A), n the lengths of the rows of W + s·B·A, a constant in the backward pass.
// With c = m/n, z = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ, y = c∘z and g the gradient of y, dm_o = Σ_n g_no·z_no / n_o.
//
// Shapes: x and y [n, O] in their storage types, c and n [O] in f32. Lengths are summed in f64.
#include "device.cuh"

struct ColumnsArgs {
    const void* x;
    const float* c;
    void* y;
    long long count, width;
    // Whether y is added to.
    int add;
};

// y (+)= c∘x. Grid: enough threads for count / V; O is a multiple of V.
template <class X, class Y, int V>
__device__ void columns(const ColumnsArgs& a) {
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at >= a.count) return;
    const float* const c = a.c + at % a.width;
    Y* const y = static_cast<Y*>(a.y) + at;
    const Vector<X, V> x = load<V>(static_cast<const X*>(a.x) + at);
    Vector<Y, V> out;
    if (a.add) out = load<V>(y);
#pragma unroll
    for (int e = 0; e < V; ++e) {
        const float value = c[e] * get(x.values[e]);
        out.values[e] = put<Y>(a.add ? get(out.values[e]) + value : value);
    }
    store(y, out);
}

// Lengths of rows of `width` values. Grid: rows. Threads: a power of two; shared memory: one double each.
__device__ __forceinline__ void length(const float* rows, long long width, float* lengths) {
    SHARED(memory);
    double* const sums = reinterpret_cast<double*>(memory);
    const float* const row = rows + blockIdx.x * width;
    double sum = 0;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) sum += double(row[i]) * double(row[i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned by = blockDim.x / 2; by > 0; by /= 2) {
        if (threadIdx.x < by) sums[threadIdx.x] += sums[threadIdx.x + by];
        __syncthreads();
    }
    if (threadIdx.x == 0) lengths[blockIdx.x] = float(sqrt(sums[0]));
}
extern "C" __global__ void __launch_bounds__(256) dora_lengths(const float* rows, long long width, float* lengths) {
    length(rows, width, lengths);
}

// The ones with `vectors` where O and addresses are multiples of V.
#define DORA_COLUMNS(X, Y, name, V)                                                                          \
    extern "C" __global__ void __launch_bounds__(256) dora_columns_##name(const ColumnsArgs a) {             \
        columns<X, Y, 1>(a);                                                                                 \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) dora_columns_vectors_##name(const ColumnsArgs a) {     \
        columns<X, Y, V>(a);                                                                                 \
    }

DORA_COLUMNS(float, float, f32, 4)
DORA_COLUMNS(Bf16, Bf16, bf16, 8)
DORA_COLUMNS(F16, F16, f16, 8)
DORA_COLUMNS(float, Bf16, f32_to_bf16, 4)
DORA_COLUMNS(float, F16, f32_to_f16, 4)
DORA_COLUMNS(Bf16, float, bf16_to_f32, 4)
DORA_COLUMNS(F16, float, f16_to_f32, 4)
