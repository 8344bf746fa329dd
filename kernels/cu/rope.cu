// Rotary positions on queries and keys, in place, and the gradient of a position's uncertainty.
//
// Source: RoPE (Su et al. 2021) in the half-split layout of Hugging Face's Llama: with x = [x1, x2] over the rotated values
// of a head, y1 = x1·cos − x2·sin, y2 = x2·cos + x1·sin. Tables may be damped by exp(−½(ω·sigma)²) (Gaussian positions); the
// transposed map, `direction` −1, is the backward either way.
//
// Shapes: x [entries, H, D], of which the first `rotated` values of each head turn; cos and sin [positions, rotated/2] in
// f32, and entry n reads row n mod positions. ∂loss/∂sigma = −sigma·Σ ω²·(g1·y1 + g2·y2): `damping` adds that sum, over
// heads, bands and the entries of a position, in f64.
#include "device.cuh"

struct RopeArgs {
    void* x;
    const float* cos;
    const float* sin;
    long long entries;
    int positions, heads, width, rotated;
    float direction;
};

// Grid: enough threads for entries·heads·(rotated/2) / V.
template <class T, int V>
__device__ void rotate(const RopeArgs& a) {
    const int half = a.rotated / 2, parts = half / V;
    const long long number = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long head = number / parts;
    if (head >= a.entries * a.heads) return;
    const int band = int(number % parts) * V;
    const long long at = head / a.heads % a.positions * half + band;
    T* const x = static_cast<T*>(a.x) + head * a.width + band;
    Vector<T, V> x1 = load<V>(x), x2 = load<V>(x + half);
    // Tables are read in pieces of 16 bytes at most.
    constexpr int W = V < 4 ? V : 4;
#pragma unroll
    for (int from = 0; from < V; from += W) {
        const Vector<float, W> cos = load<W>(a.cos + at + from), sin = load<W>(a.sin + at + from);
#pragma unroll
        for (int i = 0; i < W; ++i) {
            const float c = cos.values[i], s = sin.values[i] * a.direction;
            const float first = get(x1.values[from + i]), second = get(x2.values[from + i]);
            x1.values[from + i] = put<T>(first * c - second * s);
            x2.values[from + i] = put<T>(second * c + first * s);
        }
    }
    store(x, x1);
    store(x + half, x2);
}

struct DampingArgs {
    const void* y;
    const float* gradient;
    const float* omega_squared;
    double* sums;
    long long entries;
    int positions, heads, width, bands;
};

// A block of 128 threads per position; each sums every 128th product, then the block's sums in order.
template <class T>
__device__ void damping(const DampingArgs& a) {
    SHARED(memory);
    double* const sums = reinterpret_cast<double*>(memory);
    const long long position = blockIdx.x;
    const T* const y = static_cast<const T*>(a.y);
    double sum = 0;
    for (long long entry = position; entry < a.entries; entry += a.positions)
        for (int i = int(threadIdx.x); i < a.heads * a.bands; i += int(blockDim.x)) {
            const int band = i % a.bands;
            const long long at = (entry * a.heads + i / a.bands) * a.width + band;
            const float product = a.gradient[at] * get(y[at]) + a.gradient[at + a.bands] * get(y[at + a.bands]);
            sum += double(a.omega_squared[band] * product);
        }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned by = blockDim.x / 2; by > 0; by /= 2) {
        if (threadIdx.x < by) sums[threadIdx.x] += sums[threadIdx.x + by];
        __syncthreads();
    }
    if (threadIdx.x == 0) a.sums[position] += sums[0];
}

#define ROPE(T, name, V)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) rope_##name(const RopeArgs a) { rotate<T, 1>(a); }            \
    extern "C" __global__ void __launch_bounds__(256) rope_vectors_##name(const RopeArgs a) { rotate<T, V>(a); }    \
    extern "C" __global__ void __launch_bounds__(128) rope_damping_##name(const DampingArgs a) { damping<T>(a); }

// The second one where D and rotated/2 are multiples of V.
ROPE(float, f32, 4)
ROPE(Bf16, bf16, 8)
ROPE(F16, f16, 8)
