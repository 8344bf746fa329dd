// Nonlinearities of feed-forward layers: SwiGLU, GeGLU by tanh, GELU exact and by tanh, relu².
//
// Sources: SwiGLU, Shazeer 2020: silu(z)·u with silu(z) = z·σ(z), silu'(z) = σ·(1 + z·(1 − σ)). GELU, Hendrycks and Gimpel
// 2016: exact x·Φ(x), slope Φ(x) + x·φ(x); by tanh x·σ(2u) with u = √(2/π)·(x + 0.044715·x³), slope σ + x·σ·(1 − σ)·2u'. relu²,
// So et al. 2021, slope 2·relu(x). NaN stays NaN.
//
// Shapes: all operands of one length; gate, up and result in their storage type, the gradient of the result in f32. Backward
// puts gradients in the place of the operands. The last vector may be short.
#include "device.cuh"

struct MlpArgs {
    // Null where nothing is gated.
    void* gate;
    void* up;
    void* out;
    const float* gradient;
    long long count;
    // As numbered below.
    int activation;
};

// A value and its slope.
struct SwiGlu {
    static constexpr bool GATED = true;
    static __device__ __forceinline__ float2 of(float z) {
        const float s = 1.0f / (1.0f + expf(-z));
        return float2{z * s, s * (1.0f + z * (1.0f - s))};
    }
};
struct GeluTanh {
    static constexpr bool GATED = false;
    static __device__ __forceinline__ float2 of(float x) {
        // 2·√(2/π).
        constexpr float TWICE = 1.595769f, CUBIC = 0.044715f;
        const float z = x * x, s = 1.0f / (1.0f + expf(-TWICE * x * (1.0f + CUBIC * z)));
        return float2{x * s, s + x * s * (1.0f - s) * TWICE * (1.0f + 3.0f * CUBIC * z)};
    }
};
struct GeGlu : GeluTanh {
    static constexpr bool GATED = true;
};
struct Gelu {
    static constexpr bool GATED = false;
    static __device__ __forceinline__ float2 of(float x) {
        constexpr float ROOT_HALF = 0.70710678f, PHI = 0.3989423f;
        const float phi = 0.5f + 0.5f * erff(x * ROOT_HALF);
        return float2{x * phi, phi + x * PHI * expf(-0.5f * x * x)};
    }
};
struct Relu2 {
    static constexpr bool GATED = false;
    static __device__ __forceinline__ float2 of(float x) {
        const float z = x < 0.0f ? 0.0f : x;
        return float2{z * z, 2.0f * z};
    }
};

template <class F, class T, int V>
__device__ __forceinline__ void forward_some(const MlpArgs& a, long long at) {
    const Vector<T, V> up = load<V>(static_cast<const T*>(a.up) + at);
    Vector<T, V> gate = up, out;
    if constexpr (F::GATED) gate = load<V>(static_cast<const T*>(a.gate) + at);
#pragma unroll
    for (int e = 0; e < V; ++e) {
        const float value = F::of(get(gate.values[e])).x;
        out.values[e] = put<T>(F::GATED ? value * get(up.values[e]) : value);
    }
    store(static_cast<T*>(a.out) + at, out);
}

template <class F, class T, int V>
__device__ __forceinline__ void backward_some(const MlpArgs& a, long long at) {
    Vector<T, V> up = load<V>(static_cast<const T*>(a.up) + at), gate = up;
    if constexpr (F::GATED) gate = load<V>(static_cast<const T*>(a.gate) + at);
    // The gradient is read in pieces of 16 bytes at most.
    constexpr int W = V < 4 ? V : 4;
#pragma unroll
    for (int from = 0; from < V; from += W) {
        const Vector<float, W> gradient = load<W>(a.gradient + at + from);
#pragma unroll
        for (int i = 0; i < W; ++i) {
            const float2 of = F::of(get(gate.values[from + i]));
            const float g = gradient.values[i];
            if constexpr (F::GATED) {
                gate.values[from + i] = put<T>(g * get(up.values[from + i]) * of.y);
                up.values[from + i] = put<T>(g * of.x);
            } else {
                up.values[from + i] = put<T>(of.y * g);
            }
        }
    }
    if constexpr (F::GATED) store(static_cast<T*>(a.gate) + at, gate);
    store(static_cast<T*>(a.up) + at, up);
}

template <class F, class T, int V, bool BACKWARD>
__device__ __forceinline__ void through(const MlpArgs& a) {
    const long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (at + V <= a.count) {
        if constexpr (BACKWARD)
            backward_some<F, T, V>(a, at);
        else
            forward_some<F, T, V>(a, at);
        return;
    }
#pragma unroll 1
    for (long long i = at; i < a.count; ++i)
        if constexpr (BACKWARD)
            backward_some<F, T, 1>(a, i);
        else
            forward_some<F, T, 1>(a, i);
}

// Grid: enough threads for count / V.
template <class T, int V, bool BACKWARD>
__device__ void activate(const MlpArgs& a) {
    switch (a.activation) {
        case 0: return through<SwiGlu, T, V, BACKWARD>(a);
        case 1: return through<GeGlu, T, V, BACKWARD>(a);
        case 2: return through<Gelu, T, V, BACKWARD>(a);
        case 3: return through<GeluTanh, T, V, BACKWARD>(a);
        case 4: return through<Relu2, T, V, BACKWARD>(a);
    }
}

// The ones with `vectors` where addresses are multiples of 16 bytes.
#define MLP(T, name, V)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) mlp_forward_##name(const MlpArgs a) {               \
        activate<T, 1, false>(a);                                                                         \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) mlp_forward_vectors_##name(const MlpArgs a) {       \
        activate<T, V, false>(a);                                                                         \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) mlp_backward_##name(const MlpArgs a) {              \
        activate<T, 1, true>(a);                                                                          \
    }                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) mlp_backward_vectors_##name(const MlpArgs a) {      \
        activate<T, V, true>(a);                                                                          \
    }

MLP(float, f32, 4)
MLP(Bf16, bf16, 8)
MLP(F16, f16, 8)
