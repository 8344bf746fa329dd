// RMSNorm and LayerNorm over the last dimension, with gradients for gain and bias.
//
// Sources: Zhang and Sennrich 2019, Ba et al. 2016. With n = E and g the gradient of y:
//   rms:    y = x·r·w,            r = 1/√(mean(x²) + eps);        dx = r·g·w − x·r³/n·Σ(g·w·x),            dw = Σ g·x·r
//   layer:  y = z·w + b,          z = (x − μ)·r;                  dx = r·(g·w − mean(g·w) − z·mean(g·w·z)), dw = Σ g·z, db = Σ g
//
// Shapes: x and y [rows, E] in their storage types, gain, bias and gradients in f32, as on the CPU: dx, dw and db are added
// to what is there. The gradients of gain and bias are summed over `rows_per_block` rows in shared memory, written to
// `partials` [blocks, 2, E] and added up by norm_sums in the order of blocks.
#include "device.cuh"

struct NormArgs {
    const void* x;
    const float* gain;
    // [E] or null; LayerNorm alone.
    const float* bias;
    void* y;
    const float* gradient;
    float* dx;
    // Null where neither gain nor bias learns.
    float* partials;
    long long rows;
    int width, rows_per_block;
    float eps;
};

// Mean (0 for RMSNorm) and 1/√(mean of squares from it + eps) of a row.
template <class X, int V, bool LAYER>
__device__ __forceinline__ float2 moments(const X* x, int width, float eps, float* scratch) {
    const int step = int(blockDim.x) * V;
    float mean = 0.0f;
    if (LAYER) {
        float sum = 0.0f;
        for (int i = int(threadIdx.x) * V; i < width; i += step) {
            const auto values = load<V>(x + i);
#pragma unroll
            for (int e = 0; e < V; ++e) sum += get(values.values[e]);
        }
        mean = block_sum(sum, scratch) / float(width);
    }
    float squares = 0.0f;
    for (int i = int(threadIdx.x) * V; i < width; i += step) {
        const auto values = load<V>(x + i);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const float z = get(values.values[e]) - mean;
            squares = fmaf(z, z, squares);
        }
    }
    const float mean_square = block_sum(squares, scratch) / float(width);
    return float2{mean, 1.0f / sqrtf(mean_square + eps)};
}

// Grid: rows. Shared memory: 32 values.
template <class X, class Y, int V, bool LAYER>
__device__ void forward(const NormArgs& a) {
    SHARED(memory);
    const X* const x = static_cast<const X*>(a.x) + blockIdx.x * (long long)a.width;
    Y* const y = static_cast<Y*>(a.y) + blockIdx.x * (long long)a.width;
    const float2 of = moments<X, V, LAYER>(x, a.width, a.eps, reinterpret_cast<float*>(memory));
    for (int i = int(threadIdx.x) * V; i < a.width; i += int(blockDim.x) * V) {
        const auto values = load<V>(x + i);
        Vector<Y, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const float value = (get(values.values[e]) - of.x) * of.y * a.gain[i + e];
            out.values[e] = put<Y>(LAYER && a.bias ? value + a.bias[i + e] : value);
        }
        store(y + i, out);
    }
}

// Grid: rows / rows_per_block. Shared memory: 32 values, and 2·E where partials are wanted.
template <class X, int V, bool LAYER>
__device__ void backward(const NormArgs& a) {
    SHARED(memory);
    float* const scratch = reinterpret_cast<float*>(memory);
    float* const d_gain = scratch + 32;
    float* const d_bias = d_gain + a.width;
    const int step = int(blockDim.x) * V;
    // Every thread reads and writes its own columns of these sums and of the rows, so no barrier is needed for them.
    if (a.partials)
        for (int i = int(threadIdx.x) * V; i < a.width; i += step)
            for (int e = 0; e < V; ++e) d_gain[i + e] = d_bias[i + e] = 0.0f;
    const long long first = blockIdx.x * (long long)a.rows_per_block;
    const long long end = min(first + a.rows_per_block, a.rows);
    for (long long row = first; row < end; ++row) {
        const X* const x = static_cast<const X*>(a.x) + row * a.width;
        const float* const g = a.gradient + row * a.width;
        float* const dx = a.dx + row * a.width;
        const float2 of = moments<X, V, LAYER>(x, a.width, a.eps, scratch);
        const float mean = of.x, r = of.y;
        float even = 0.0f, pull = 0.0f;
        for (int i = int(threadIdx.x) * V; i < a.width; i += step) {
            const auto values = load<V>(x + i);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float gw = g[i + e] * a.gain[i + e];
                even += gw;
                pull = fmaf(gw, get(values.values[e]) - mean, pull);
            }
        }
        even = LAYER ? block_sum(even, scratch) / float(a.width) : 0.0f;
        pull = block_sum(pull, scratch) * r * r / float(a.width);
        for (int i = int(threadIdx.x) * V; i < a.width; i += step) {
            const auto values = load<V>(x + i);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float z = get(values.values[e]) - mean, gradient = g[i + e];
                dx[i + e] += r * (gradient * a.gain[i + e] - even - z * pull);
                if (a.partials) {
                    d_gain[i + e] += gradient * z * r;
                    if (LAYER) d_bias[i + e] += gradient;
                }
            }
        }
    }
    if (a.partials)
        for (int i = int(threadIdx.x) * V; i < a.width; i += step)
            for (int e = 0; e < V; ++e) {
                float* const out = a.partials + blockIdx.x * 2ll * a.width + i + e;
                out[0] = d_gain[i + e];
                out[a.width] = d_bias[i + e];
            }
}

// Adds partials [blocks, 2, E] to the gradients that are wanted. Grid: enough threads for E.
extern "C" __global__ void norm_sums(const float* partials, int blocks, int width, float* d_gain, float* d_bias) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= width) return;
    float gain = 0.0f, bias = 0.0f;
    for (int block = 0; block < blocks; ++block) {
        gain += partials[block * 2ll * width + i];
        bias += partials[(block * 2ll + 1) * width + i];
    }
    if (d_gain) d_gain[i] += gain;
    if (d_bias) d_bias[i] += bias;
}

// The ones with `vectors` where E is a multiple of V.
#define NORM_FORWARD(kind, LAYER, X, Y, name, V)                                                        \
    extern "C" __global__ void __launch_bounds__(256) kind##_forward_##name(const NormArgs a) {          \
        forward<X, Y, 1, LAYER>(a);                                                                     \
    }                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) kind##_forward_vectors_##name(const NormArgs a) {  \
        forward<X, Y, V, LAYER>(a);                                                                     \
    }
#define NORM_BACKWARD(kind, LAYER, X, name, V)                                                          \
    extern "C" __global__ void __launch_bounds__(256) kind##_backward_##name(const NormArgs a) {         \
        backward<X, 1, LAYER>(a);                                                                       \
    }                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) kind##_backward_vectors_##name(const NormArgs a) { \
        backward<X, V, LAYER>(a);                                                                       \
    }
#define NORM(kind, LAYER)                                       \
    NORM_FORWARD(kind, LAYER, float, float, f32, 4)             \
    NORM_FORWARD(kind, LAYER, Bf16, Bf16, bf16, 8)              \
    NORM_FORWARD(kind, LAYER, F16, F16, f16, 8)                 \
    NORM_FORWARD(kind, LAYER, float, Bf16, f32_to_bf16, 4)      \
    NORM_FORWARD(kind, LAYER, float, F16, f32_to_f16, 4)        \
    NORM_FORWARD(kind, LAYER, Bf16, float, bf16_to_f32, 4)      \
    NORM_FORWARD(kind, LAYER, F16, float, f16_to_f32, 4)        \
    NORM_BACKWARD(kind, LAYER, float, f32, 4)                   \
    NORM_BACKWARD(kind, LAYER, Bf16, bf16, 8)                   \
    NORM_BACKWARD(kind, LAYER, F16, f16, 8)

NORM(rms, false)
NORM(layer, true)
